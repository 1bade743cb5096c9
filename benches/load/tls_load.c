/*
 * tls_load: both ends of a TLS proxy's connections. The proxy between them is the subject.
 *
 *     tls_load serve --listen-fd N            the plain service
 *     tls_load MODE --port P --roots FILE [--certificate FILE --private-key FILE] --seconds S --warm S --count N
 *             [--rate BYTES]
 *
 * The service does on each connection what its first byte says: S sends without end, K swallows, E echoes.
 * Modes (each prints one line of JSON): `receive` and `send` move bytes on N connections; `echo` measures a
 * one-byte echo on one connection, `busy-echo` the same beside a connection that receives, all it can or
 * --rate bytes a second; `full` and `resumed`
 * make connections with N at a time, each with an echo that proves it; `hold` opens N connections, says so,
 * and keeps them until it is ended.
 *
 * OpenSSL, TLS 1.3, TLS_AES_256_GCM_SHA384, X25519: the same for every subject.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
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

enum { BLOCK = 128 * 1024, MAX_LANES = 64, MAX_SAMPLES = 1 << 20, MAX_FDS = 65536 };

static int port, lanes = 1;
static double seconds = 1.5, warm = 0.3, rate;
static SSL_CTX *context;
static atomic_bool measuring, over;
static atomic_ullong moved, made;

static void die(const char *what) {
    fprintf(stderr, "tls_load: %s: %s\n", what, strerror(errno));
    ERR_print_errors_fp(stderr);
    exit(1);
}

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
}

static void rest(double time) {
    struct timespec left = {(time_t)time, (long)((time - (double)(time_t)time) * 1e9)};
    while (nanosleep(&left, &left) && errno == EINTR) {
    }
}

static void at_once(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* -- the service ------------------------------------------------------------------------------------- */

static char what[MAX_FDS];

static void forget(int fd) {
    what[fd] = 0;
    close(fd);
}

static void served(int poll, int fd, char *block) {
    ssize_t done;

    if (what[fd] == 'S') {
        done = send(fd, block, BLOCK, MSG_NOSIGNAL);
        if (done < 0 && errno != EAGAIN)
            forget(fd);
        return;
    }
    done = recv(fd, block, BLOCK, 0);
    if (done < 0 && errno == EAGAIN)
        return;
    if (done <= 0) {
        forget(fd);
        return;
    }
    if (!what[fd]) {
        what[fd] = block[0];
        if (what[fd] == 'S') {
            struct epoll_event writable = {.events = EPOLLOUT, .data.fd = fd};
            epoll_ctl(poll, EPOLL_CTL_MOD, fd, &writable);
            return;
        }
    }
    if (what[fd] == 'E' && send(fd, block, (size_t)done, MSG_NOSIGNAL) != done)
        forget(fd);
}

_Noreturn static void serve(int listener) {
    int poll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event one = {.events = EPOLLIN, .data.fd = listener}, found[256];
    char *block = calloc(1, BLOCK);

    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &one);
    for (;;) {
        int count = epoll_wait(poll, found, 256, -1);
        for (int at = 0; at < count; at++) {
            int fd = found[at].data.fd;
            if (fd != listener) {
                served(poll, fd, block);
                continue;
            }
            fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd < 0 || fd >= MAX_FDS)
                continue;
            at_once(fd);
            one = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
            epoll_ctl(poll, EPOLL_CTL_ADD, fd, &one);
        }
    }
}

/* -- clients ----------------------------------------------------------------------------------------- */

static SSL *open_one(SSL_SESSION *session) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    SSL *tls = SSL_new(context);

    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
        die("connect");
    at_once(fd);
    SSL_set_fd(tls, fd);
    SSL_set_tlsext_host_name(tls, "localhost");
    SSL_set1_host(tls, "localhost");
    if (session)
        SSL_set_session(tls, session);
    if (SSL_connect(tls) != 1)
        die("handshake");
    return tls;
}

static void close_one(SSL *tls) {
    struct linger gone = {1, 0};
    SSL_shutdown(tls);
    /* A port in TIME_WAIT for each of thousands of connections would end the run. */
    setsockopt(SSL_get_fd(tls), SOL_SOCKET, SO_LINGER, &gone, sizeof gone);
    close(SSL_get_fd(tls));
    SSL_free(tls);
}

static void echo(SSL *tls, char *byte) {
    if (SSL_write(tls, byte, 1) != 1 || SSL_read(tls, byte, 1) != 1)
        die("echo");
}

static void *receive(void *unused) {
    SSL *tls = open_one(NULL);
    char *block = malloc(BLOCK);
    int got;

    (void)unused;
    if (SSL_write(tls, "S", 1) != 1)
        die("write");
    double due = now();

    while (!over && (got = SSL_read(tls, block, BLOCK)) > 0) {
        if (measuring)
            moved += (unsigned long long)got;
        if (!rate)
            continue;
        /* What a delay kept back is not made up for: the flow would not be even. */
        double at = now();
        due = (due < at - 0.01 ? at : due) + (double)got / rate;
        if (due > at + 2e-4)
            rest(due - at);
    }
    if (!over)
        die("read");
    return NULL;
}

static void *transmit(void *unused) {
    SSL *tls = open_one(NULL);
    char *block = calloc(1, BLOCK);
    int put;

    (void)unused;
    memset(block, 'K', BLOCK);
    while (!over && (put = SSL_write(tls, block, BLOCK)) > 0)
        if (measuring)
            moved += (unsigned long long)put;
    if (!over)
        die("write");
    return NULL;
}

static void *connecting(void *resumed) {
    SSL_SESSION *session = NULL;
    char byte;

    do {
        SSL *tls = open_one(session);
        if (session && !SSL_session_reused(tls)) {
            fprintf(stderr, "tls_load: a session was not resumed\n");
            exit(1);
        }
        byte = 'E';
        echo(tls, &byte);
        if (resumed) {
            SSL_SESSION_free(session);
            session = SSL_get1_session(tls);
        }
        close_one(tls);
        if (measuring)
            made++;
    } while (!over);
    return NULL;
}

static void run(void *(*work)(void *), void *given) {
    pthread_t thread[MAX_LANES];

    for (int at = 0; at < lanes; at++)
        pthread_create(&thread[at], NULL, work, given);
    rest(warm);
    /* The bench reads the proxy's clock at these two lines. */
    printf("begin\n");
    fflush(stdout);
    double begun = now();
    measuring = true;
    rest(seconds);
    measuring = false;
    double took = now() - begun;
    printf("{\"seconds\": %.6f, \"bytes\": %llu, \"connections\": %llu}\n", took, (unsigned long long)moved,
           (unsigned long long)made);
    fflush(stdout);
    over = true;
    _exit(0);
}

static int by_size(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void echoes(bool busy) {
    double *took = malloc(MAX_SAMPLES * sizeof *took), until;
    SSL *tls = open_one(NULL);
    pthread_t thread;
    int count = 0;
    char byte = 'E';

    if (busy)
        pthread_create(&thread, NULL, receive, NULL);
    for (until = now() + warm; now() < until;)
        echo(tls, &byte);
    printf("begin\n");
    fflush(stdout);
    measuring = true;
    double start = now();
    for (until = start + seconds; count < MAX_SAMPLES;) {
        double begun = now();
        if (begun >= until)
            break;
        echo(tls, &byte);
        took[count++] = now() - begun;
    }
    double rate_seen = (double)moved / (now() - start);
    qsort(took, (size_t)count, sizeof *took, by_size);
    printf("{\"p50\": %.9f, \"p99\": %.9f, \"count\": %d, \"rate\": %.0f}\n", took[count / 2], took[count * 99 / 100], count,
           rate_seen);
    fflush(stdout);
    _exit(0);
}

static void hold(int count) {
    char byte;

    for (int at = 0; at < count; at++) {
        SSL *tls = open_one(NULL);
        byte = 'E';
        echo(tls, &byte);
    }
    printf("{\"connections\": %d}\n", count);
    fflush(stdout);
    for (;;)
        pause();
}

int main(int count, char **arguments) {
    static const struct option names[] = {{"listen-fd", 1, 0, 'l'}, {"port", 1, 0, 'p'},        {"roots", 1, 0, 'r'},
                                          {"certificate", 1, 0, 'c'}, {"private-key", 1, 0, 'k'}, {"seconds", 1, 0, 's'},
                                          {"warm", 1, 0, 'w'},        {"count", 1, 0, 'n'},       {"rate", 1, 0, 'b'},
                                          {0}};
    const char *mode = count > 1 ? arguments[1] : "", *roots = NULL, *certificate = NULL, *key = NULL;
    struct rlimit files;
    int choice, listener = -1, wanted = 1;

    while ((choice = getopt_long(count - 1, arguments + 1, "", names, NULL)) != -1) {
        switch (choice) {
        case 'l': listener = atoi(optarg); break;
        case 'p': port = atoi(optarg); break;
        case 'r': roots = optarg; break;
        case 'c': certificate = optarg; break;
        case 'k': key = optarg; break;
        case 's': seconds = atof(optarg); break;
        case 'w': warm = atof(optarg); break;
        case 'n': wanted = atoi(optarg); break;
        case 'b': rate = atof(optarg); break;
        default: return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (!strcmp(mode, "serve"))
        serve(listener);
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_ciphersuites(context, "TLS_AES_256_GCM_SHA384");
    SSL_CTX_set1_groups_list(context, "X25519");
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    if (SSL_CTX_load_verify_locations(context, roots, NULL) != 1)
        die("roots");
    if (certificate && (SSL_CTX_use_certificate_chain_file(context, certificate) != 1 ||
                        SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1))
        die("certificate");
    lanes = wanted < MAX_LANES ? wanted : MAX_LANES;
    if (!strcmp(mode, "receive"))
        run(receive, NULL);
    if (!strcmp(mode, "send"))
        run(transmit, NULL);
    if (!strcmp(mode, "full"))
        run(connecting, NULL);
    if (!strcmp(mode, "resumed"))
        run(connecting, context);
    if (!strcmp(mode, "echo"))
        echoes(false);
    if (!strcmp(mode, "busy-echo"))
        echoes(true);
    if (!strcmp(mode, "hold"))
        hold(wanted);
    return 2;
}
