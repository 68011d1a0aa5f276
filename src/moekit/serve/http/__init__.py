"""The OpenAI-compatible server: `moekit.serve.http.app.create_app`. Needs the extra `serve`."""
