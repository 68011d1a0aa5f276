"""The most memory that a child process has had: code to run in it."""

# Not ru_maxrss: a child starts with its parent's, so that a heavy test process would speak for it.
PEAK = '''
def peak():
    """Bytes."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(next(x for x in file if x.startswith("VmHWM")).split()[1])
    except OSError:  # no Linux
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
'''
