/*
 * Faults at a counted moment, for a process that runs under LD_PRELOAD and calls `arm`: a kill, a rename that is done and
 * reports an error, a clock that jumps. Calls that change files are counted; those of other processes pass as they are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, KILL, RENAME, CLOCK };

static pid_t armed;
static int kind;
static long at, value, events, renames, shift;

void arm(int new_kind, long new_at, long new_value) {
    kind = new_kind, at = new_at, value = new_value;
    events = renames = shift = 0;
    armed = getpid();
}

long counted_events(void) { return events; }
long counted_renames(void) { return renames; }

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* Counts a call, and tells whether this process is to die in it. */
static int due(void) {
    if (armed != getpid()) return 0;
    long number = __atomic_add_fetch(&events, 1, __ATOMIC_SEQ_CST);
    if (kind == CLOCK && number >= at) shift = value;
    return kind == KILL && number == at;
}

static void counted(void) {
    if (due()) kill(armed, SIGKILL);
}

static int is_file(int fd) {
    struct stat facts;
    return fd > 2 && fstat(fd, &facts) == 0 && S_ISREG(facts.st_mode);
}

/* A kill comes in the middle of what is written. */
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (armed && is_file(fd) && due()) {
        real(fd, data, size / 2);
        kill(armed, SIGKILL);
    }
    return real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL(pwrite);
    if (armed && is_file(fd)) counted();
    return real(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    if (armed && is_file(fd)) counted();
    return real(fd, parts, count);
}

#define OPEN(name)                                          \
    int name(const char *path, int flags, ...) {            \
        REAL(name);                                         \
        va_list rest;                                       \
        va_start(rest, flags);                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                       \
        if (flags & (O_CREAT | O_TRUNC)) counted();         \
        return real(path, flags, mode);                     \
    }
OPEN(open)
OPEN(open64)

#define COUNTED(result, name, parameters, arguments) \
    result name parameters {                         \
        REAL(name);                                  \
        counted();                                   \
        return real arguments;                       \
    }
COUNTED(int, unlink, (const char *path), (path))
COUNTED(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
COUNTED(int, rmdir, (const char *path), (path))
COUNTED(int, mkdir, (const char *path, mode_t mode), (path, mode))
COUNTED(int, link, (const char *from, const char *to), (from, to))
COUNTED(int, fsync, (int fd), (fd))
COUNTED(int, ftruncate64, (int fd, off64_t size), (fd, size))

/* As NFS does whose answer was lost: the rename is done, and the one who asked for it hears of an error. */
int rename(const char *from, const char *to) {
    REAL(rename);
    counted();
    int result = real(from, to);
    if (armed == getpid() && result == 0 && ++renames == at && kind == RENAME) {
        errno = value;
        return -1;
    }
    return result;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (shift && clock == CLOCK_REALTIME && armed == getpid()) now->tv_sec += shift;
    return result;
}

time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
