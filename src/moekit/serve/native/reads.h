/* Records read from files into memory by threads of their own, each followed by its checksum: no lock of Python's, no
   hand-over between its threads, and a layer's reads begin in one call.

   A job is known by the slot that it reads into; a slot has one job at a time. Urgent jobs go first; one that is not
   begins when no urgent one waits and fewer than `quiet` jobs run. */

#include <errno.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

enum { IDLE, QUEUED, RUNNING, DONE, FAILED, DAMAGED };

typedef struct {
    int64_t file, offset, size, into, sum; /* `into`: an address; `sum`: what moekit_checksum must give, or -1 */
} Job;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pthread_t *threads;
    Job *jobs;
    int32_t *state, *queue[2]; /* by slot; slots in order, of urgent jobs and of others */
    double *seconds;
    int count, slots, quiet, running, stopped, length[2];
} Reads;

static uint32_t crc_table[256];

static void make_crc_table(void) {
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t c = n;
        for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
        crc_table[n] = c;
    }
}

static uint32_t crc_of(const void *from, long size, uint32_t crc) { /* CRC-32 as zlib has it */
    const uint8_t *p = (const uint8_t *)from;
    crc = ~crc;
    while (size--) crc = crc_table[(crc ^ *p++) & 255] ^ (crc >> 8);
    return ~crc;
}

/* CRC-32 of the sums of rows and columns, as moekit.serve.store.checksum; size in bytes, whole pages. */
uint32_t moekit_checksum(const void *record, long size) {
    uint64_t columns[512] = {0};
    uint32_t crc = 0;
    for (long at = 0; at < size; at += 4096) {
        const uint64_t *words = (const uint64_t *)((const uint8_t *)record + at);
        uint64_t row = 0;
        for (int i = 0; i < 512; i++) {
            columns[i] += words[i];
            row += words[i];
        }
        crc = crc_of(&row, 8, crc);
    }
    return crc_of(columns, sizeof columns, crc);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int32_t read_record(const Job *job) {
    for (int64_t done = 0; done < job->size;) {
        const ssize_t count =
            pread((int)job->file, (void *)(intptr_t)(job->into + done), (size_t)(job->size - done), job->offset + done);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0 || (count % 4096 && done + count < job->size)) return FAILED;
        done += count;
    }
    if (job->sum < 0) return DONE;
    return moekit_checksum((const void *)(intptr_t)job->into, job->size) == (uint32_t)job->sum ? DONE : DAMAGED;
}

static void take_out(Reads *reads, int kind, int at) {
    memmove(reads->queue[kind] + at, reads->queue[kind] + at + 1, sizeof(int32_t) * (--reads->length[kind] - at));
}

static void *worker(void *argument) {
    Reads *reads = (Reads *)argument;
    pthread_mutex_lock(&reads->lock);
    while (!reads->stopped) {
        const int kind = reads->length[0] ? 0 : 1;
        if (!reads->length[kind] || (kind && reads->running >= reads->quiet)) {
            pthread_cond_wait(&reads->work, &reads->lock);
            continue;
        }
        const int slot = reads->queue[kind][0];
        take_out(reads, kind, 0);
        reads->state[slot] = RUNNING;
        reads->running++;
        if (reads->length[1]) pthread_cond_signal(&reads->work);
        pthread_mutex_unlock(&reads->lock);
        const double started = now();
        const int32_t state = read_record(reads->jobs + slot);
        pthread_mutex_lock(&reads->lock);
        reads->seconds[slot] = now() - started;
        reads->state[slot] = state;
        reads->running--;
        if (reads->length[1]) pthread_cond_signal(&reads->work);
        pthread_cond_broadcast(&reads->done);
    }
    pthread_mutex_unlock(&reads->lock);
    return 0;
}

/* End the threads, after the reads that they are at. */
void moekit_reads_end(Reads *reads) {
    pthread_mutex_lock(&reads->lock);
    reads->stopped = 1;
    pthread_cond_broadcast(&reads->work);
    pthread_mutex_unlock(&reads->lock);
    for (int i = 0; i < reads->count; i++) pthread_join(reads->threads[i], 0);
    free(reads->threads);
    free(reads->jobs);
    free(reads->queue[0]);
    free(reads->queue[1]);
    free(reads);
}

/* Threads that read; `state` and `seconds` [slots] belong to the caller. 0: there is no memory, or no thread. */
Reads *moekit_reads_begin(int threads, int slots, int quiet, int32_t *state, double *seconds) {
    Reads *reads = (Reads *)calloc(1, sizeof *reads);
    if (!reads) return 0;
    make_crc_table();
    pthread_mutex_init(&reads->lock, 0);
    pthread_cond_init(&reads->work, 0);
    pthread_cond_init(&reads->done, 0);
    reads->slots = slots, reads->quiet = quiet, reads->state = state, reads->seconds = seconds;
    reads->threads = (pthread_t *)calloc(threads, sizeof *reads->threads);
    reads->jobs = (Job *)calloc(slots, sizeof *reads->jobs);
    for (int kind = 0; kind < 2; kind++) reads->queue[kind] = (int32_t *)calloc(slots, sizeof(int32_t));
    if (reads->threads && reads->jobs && reads->queue[0] && reads->queue[1])
        while (reads->count < threads && !pthread_create(reads->threads + reads->count, 0, worker, reads))
            reads->count++;
    if (reads->count) return reads;
    moekit_reads_end(reads);
    return 0;
}

/* Put jobs [n] into slots [n] that have none. */
void moekit_reads_start(Reads *reads, int n, const int32_t *slots, const Job *jobs, int urgent) {
    pthread_mutex_lock(&reads->lock);
    for (int i = 0; i < n; i++) {
        reads->jobs[slots[i]] = jobs[i];
        reads->state[slots[i]] = QUEUED;
        reads->queue[!urgent][reads->length[!urgent]++] = slots[i];
        if (i < reads->count) pthread_cond_signal(&reads->work);
    }
    pthread_mutex_unlock(&reads->lock);
}

/* Take a job that has not begun out of its queue, and where it is urgent now, put it at the end of that of urgent ones;
   whether it had not begun. */
int moekit_reads_change(Reads *reads, int slot, int urgent) {
    int found = 0;
    pthread_mutex_lock(&reads->lock);
    if (reads->state[slot] == QUEUED) {
        for (int kind = 0; kind < 2 && !found; kind++)
            for (int i = 0; i < reads->length[kind] && !found; i++)
                if (reads->queue[kind][i] == slot) take_out(reads, kind, i), found = 1;
        if (urgent) {
            reads->queue[0][reads->length[0]++] = slot;
            pthread_cond_signal(&reads->work);
        } else
            reads->state[slot] = IDLE;
    }
    pthread_mutex_unlock(&reads->lock);
    return found;
}

/* Wait until the job of one of these slots [n] is over; that slot. */
int moekit_reads_wait(Reads *reads, int n, const int32_t *slots) {
    pthread_mutex_lock(&reads->lock);
    for (;;) {
        for (int i = 0; i < n; i++)
            if (reads->state[slots[i]] >= DONE) {
                pthread_mutex_unlock(&reads->lock);
                return slots[i];
            }
        pthread_cond_wait(&reads->done, &reads->lock);
    }
}
