/*
 * tunnel_load: both ends of a tunnel's connections. The tunnel between them is the subject.
 *
 *     tunnel_load serve --listen-fd N         the service
 *     tunnel_load MODE --port P --seconds S --warm S --count N
 *
 * The service does on each connection what its first byte says: S sends without end, E echoes; a thread for each
 * that sends, so that it is never the sender that an echo waits for. Modes of a visitor (each prints one line of
 * JSON): `receive` moves bytes on one connection; `echo` measures a one-byte echo, `busy-echo` the same beside a
 * connection that receives all it can; `visit` makes connections, N at a time, each with an echo that proves it and
 * an orderly end; `hold` opens N connections, says so, and keeps them; `stall` asks for bytes and never reads them.
 *
 * What is not here: TLS, which visitors of these rows do not speak (see tls_load.c).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 256 * 1024, MAX_SAMPLES = 1 << 20, MAX_LANES = 1024, PAUSE_NS = 1000 * 1000 };

static int port;
static double seconds = 1.5, warm = 0.3;

static void die(const char *what) {
    fprintf(stderr, "tunnel_load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
}

/* The bench reads the tunnel's clock at this line and at the one with the figures. */
static void begin(void) {
    printf("begin\n");
    fflush(stdout);
}

static void at_once(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static void start(void *(*work)(void *), void *given) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, given))
        die("thread");
    pthread_detach(thread);
}

/* -- the service ------------------------------------------------------------------------------------- */

static void *send_without_end(void *given) {
    int fd = (int)(long)given;
    char *block = calloc(1, BLOCK);

    while (block && send(fd, block, BLOCK, MSG_NOSIGNAL) > 0) {
    }
    free(block);
    close(fd);
    return NULL;
}

_Noreturn static void serve(int listener) {
    int poll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event one = {.events = EPOLLIN, .data.u64 = (uint64_t)listener}, found[256];
    static char block[64 * 1024], fresh[1 << 20];

    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &one);
    for (;;) {
        int count = epoll_wait(poll, found, 256, -1);
        for (int at = 0; at < count; at++) {
            int fd = (int)found[at].data.u64;
            if (fd == listener) {
                fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
                if (fd < 0 || fd >= (int)sizeof fresh)
                    continue;
                at_once(fd);
                fresh[fd] = 1;
                one = (struct epoll_event){.events = EPOLLIN, .data.u64 = (uint64_t)fd};
                epoll_ctl(poll, EPOLL_CTL_ADD, fd, &one);
                continue;
            }
            ssize_t got = recv(fd, block, sizeof block, 0);
            if (got > 0 && fresh[fd] && block[0] == 'S') {
                epoll_ctl(poll, EPOLL_CTL_DEL, fd, NULL);
                start(send_without_end, (void *)(long)fd);
                continue;
            }
            if (got <= 0 || send(fd, block, (size_t)got, MSG_NOSIGNAL) != got) {
                close(fd);
                continue;
            }
            fresh[fd] = 0;
        }
    }
}

/* -- visitors ---------------------------------------------------------------------------------------- */

static const struct sockaddr *public_port(void) {
    static struct sockaddr_in to;
    to = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    return (const struct sockaddr *)&to;
}

static int visit_one(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || connect(fd, public_port(), sizeof(struct sockaddr_in)))
        die("connect");
    at_once(fd);
    return fd;
}

static void echo(int fd) {
    char byte = 'E';
    if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1 || recv(fd, &byte, 1, 0) != 1)
        die("echo");
}

static int ask_for_bytes(void) {
    int fd = visit_one();
    if (send(fd, "S", 1, MSG_NOSIGNAL) != 1)
        die("send");
    return fd;
}

static void receive(void) {
    static char block[1 << 20];
    int fd = ask_for_bytes();
    double until = now() + warm, begun = 0;
    unsigned long long moved = 0;

    for (;;) {
        ssize_t got = recv(fd, block, sizeof block, 0);
        double at = now();
        if (got <= 0)
            die("receive");
        if (begun)
            moved += (unsigned long long)got;
        if (at < until)
            continue;
        if (begun) {
            printf("{\"seconds\": %.6f, \"bytes\": %llu}\n", at - begun, moved);
            return;
        }
        begin();
        begun = now();
        until = begun + seconds;
    }
}

static void *swallow(void *given) {
    int fd = (int)(long)given;
    char *block = malloc(BLOCK);
    while (block && recv(fd, block, BLOCK, 0) > 0) {
    }
    die("the bulk connection ended");
    return NULL;
}

static int by_size(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void echoes(bool busy) {
    double *took = malloc(MAX_SAMPLES * sizeof *took), until;
    const struct timespec pause = {0, PAUSE_NS};
    int fd = visit_one(), count = 0;

    if (busy)
        start(swallow, (void *)(long)ask_for_bytes());
    for (until = now() + warm; now() < until;)
        echo(fd);
    begin();
    for (until = now() + seconds; count < MAX_SAMPLES;) {
        double begun = now();
        if (begun >= until)
            break;
        echo(fd);
        took[count++] = now() - begun;
        /* Somebody who types, not somebody who floods. */
        if (busy)
            nanosleep(&pause, NULL);
    }
    qsort(took, (size_t)count, sizeof *took, by_size);
    printf("{\"p50\": %.9f, \"p99\": %.9f, \"count\": %d}\n", took[count / 2], took[count * 99 / 100], count);
}

/* One thread for all lanes: the tunnels have the cores. */
static void visit(int lanes) {
    enum { CONNECTING, ECHOING } state[MAX_LANES];
    int poll = epoll_create1(EPOLL_CLOEXEC), fds[MAX_LANES];
    struct epoll_event found[256], one;
    unsigned long long made = 0;
    double begun = 0, until = now() + warm;
    char byte = 'E';

    for (int at = 0; at < lanes; at++)
        fds[at] = -1;
    for (;;) {
        for (int at = 0; at < lanes; at++) {
            if (fds[at] >= 0)
                continue;
            fds[at] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (fds[at] < 0 || (connect(fds[at], public_port(), sizeof(struct sockaddr_in)) && errno != EINPROGRESS))
                die("connect");
            at_once(fds[at]);
            state[at] = CONNECTING;
            one = (struct epoll_event){.events = EPOLLOUT, .data.u32 = (uint32_t)at};
            epoll_ctl(poll, EPOLL_CTL_ADD, fds[at], &one);
        }
        int count = epoll_wait(poll, found, 256, 5000);
        if (!count) {
            errno = ETIMEDOUT;
            die("visits");
        }
        for (int i = 0; i < count; i++) {
            int at = (int)found[i].data.u32;
            if (state[at] == CONNECTING) {
                byte = 'E';
                if (send(fds[at], &byte, 1, MSG_NOSIGNAL) != 1)
                    die("visit");
                state[at] = ECHOING;
                one = (struct epoll_event){.events = EPOLLIN, .data.u32 = (uint32_t)at};
                epoll_ctl(poll, EPOLL_CTL_MOD, fds[at], &one);
                continue;
            }
            if (recv(fds[at], &byte, 1, 0) != 1)
                die("the echo of a visit");
            close(fds[at]);
            fds[at] = -1;
            made += begun > 0;
        }
        double at = now();
        if (at < until)
            continue;
        if (begun) {
            printf("{\"seconds\": %.6f, \"visits\": %llu}\n", at - begun, made);
            return;
        }
        begin();
        begun = now();
        until = begun + seconds;
    }
}

_Noreturn static void hold(int count) {
    for (int at = 0; at < count; at++)
        echo(visit_one());
    printf("{\"connections\": %d}\n", count);
    fflush(stdout);
    for (;;)
        pause();
}

_Noreturn static void stall(void) {
    char byte;
    int fd = ask_for_bytes();

    if (recv(fd, &byte, 1, 0) != 1)
        die("receive");
    printf("{}\n");
    fflush(stdout);
    for (;;)
        pause();
}

int main(int count, char **arguments) {
    static const struct option names[] = {{"listen-fd", 1, 0, 'l'}, {"port", 1, 0, 'p'},  {"seconds", 1, 0, 's'},
                                          {"warm", 1, 0, 'w'},      {"count", 1, 0, 'n'}, {0}};
    const char *mode = count > 1 ? arguments[1] : "";
    struct rlimit files;
    int choice, listener = -1, wanted = 1;

    while ((choice = getopt_long(count - 1, arguments + 1, "", names, NULL)) != -1) {
        switch (choice) {
        case 'l': listener = atoi(optarg); break;
        case 'p': port = atoi(optarg); break;
        case 's': seconds = atof(optarg); break;
        case 'w': warm = atof(optarg); break;
        case 'n': wanted = atoi(optarg); break;
        default: return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (!strcmp(mode, "serve"))
        serve(listener);
    if (!strcmp(mode, "hold"))
        hold(wanted);
    if (!strcmp(mode, "stall"))
        stall();
    if (!strcmp(mode, "receive"))
        receive();
    else if (!strcmp(mode, "echo"))
        echoes(false);
    else if (!strcmp(mode, "busy-echo"))
        echoes(true);
    else if (!strcmp(mode, "visit"))
        visit(wanted < MAX_LANES ? wanted : MAX_LANES);
    else
        return 2;
    return 0;
}
