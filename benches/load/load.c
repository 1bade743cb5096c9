/*
 * load: sends packets through a pump under test, reads them at the other side, and measures.
 *
 *     load --mode receive|send|both|tcp --tls-fd N [--packet-fd N] --pump PID --size BYTES --seconds S
 *          [--warm S] [--rate PACKETS] [--batch N] [--key HEX]
 *     load --mode discard --port PORT     reads and drops what one TCP connection after another brings
 *
 *     receive  TLS records -> pump -> datagram socket
 *     send     datagram socket -> pump -> TLS records
 *     both     the two at once
 *     tcp      like receive, with the segments of one TCP flow as packets (see inner_tcp.c)
 *
 * The two fds are inherited: a connected TCP socket, on which the pump is the TLS client, and one end of a
 * datagram socket pair. Each packet is one record and carries a sequence number and the time when it was due,
 * so that a late generator shows as latency and not as a gentler load. One line of JSON goes to stdout.
 *
 * The pump's processor time is read here, from its process clock, at both ends of the measured window: all of
 * its threads, user and kernel time, the same for every pump.
 */
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEADER = 40, TICK_NS = 100000, SNAP = 64 };

struct options options = {.tls_fd = -1, .packet_fd = -1, .size = 1280, .batch = 64, .warm = 0.3, .seconds = 1.5};
struct record_session session;
struct flow decapsulated, encapsulated;
_Atomic bool recording, stopping;

/* ---- clocks and counters ---- */

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t cpu_ns(pid_t pid) {
    struct timespec t;
    clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;

    if ((pid && clock_getcpuclockid(pid, &clock)) || clock_gettime(clock, &t))
        die("cannot read the processor time of process %d: it has ended", (int)pid);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static unsigned bucket_of(uint64_t value) {
    unsigned top;

    if (value < 1u << STEP_BITS)
        return (unsigned)value;
    top = 63u - (unsigned)__builtin_clzll(value);
    return ((top - STEP_BITS + 1) << STEP_BITS) + (unsigned)(value >> (top - STEP_BITS)) - (1u << STEP_BITS);
}

static uint64_t value_of(unsigned bucket) {
    unsigned shift = bucket >> STEP_BITS;
    uint64_t step = bucket & ((1u << STEP_BITS) - 1);

    return shift ? (step + (1u << STEP_BITS)) << (shift - 1) : step;
}

void record_latency(struct flow *flow, uint64_t nanoseconds, uint64_t count) {
    flow->latency[bucket_of(nanoseconds)] += count;
}

uint64_t percentile(const struct flow *flow, double part) {
    uint64_t total = 0, seen = 0;

    for (unsigned i = 0; i < BUCKETS; i++)
        total += flow->latency[i];
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += flow->latency[i];
        if (total && (double)seen >= part * (double)total)
            return value_of(i);
    }
    return 0;
}

static void add(_Atomic uint64_t *counter, uint64_t n) {
    /* One writer each: a plain add with relaxed order is enough. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

/* ---- packets ---- */

static void fill_packet(unsigned char *packet) {
    memset(packet, 0x5a, options.size);
    memset(packet, 0, HEADER);
    packet[0] = 0x60;
    packet[4] = (unsigned char)((options.size - HEADER) >> 8);
    packet[5] = (unsigned char)(options.size - HEADER);
    packet[6] = 253; /* for experiments: no transport that anybody would coalesce */
    packet[7] = 64;
    packet[8] = packet[24] = 0xfd;
    packet[23] = 2;
    packet[39] = 1;
}

static void stamp(unsigned char *packet, uint64_t sequence, uint64_t due) {
    memcpy(packet + HEADER, &sequence, 8);
    memcpy(packet + HEADER + 8, &due, 8);
}

/* Counts one packet that arrived; the caller adds to `packets` once per batch. */
static void take(struct flow *flow, const unsigned char *packet, size_t length, uint64_t *next, uint64_t now) {
    uint64_t sequence, due;

    if (length != options.size || packet[0] >> 4 != 6) {
        add(&flow->invalid, 1);
        return;
    }
    memcpy(&sequence, packet + HEADER, 8);
    memcpy(&due, packet + HEADER + 8, 8);
    if (sequence < *next) {
        add(&flow->invalid, 1);
        return;
    }
    if (sequence > *next)
        add(&flow->lost, sequence - *next);
    *next = sequence + 1;
    if (recording && now > due)
        record_latency(flow, now - due, 1);
}

/* ---- pacing ---- */

struct pace {
    uint64_t start, tick, sent;
};

/* How many packets are to go out now, and the time when they were due. Sleeps until there are some. */
static unsigned pace_next(struct pace *pace, uint64_t *due) {
    if (!options.rate) {
        *due = now_ns();
        return options.batch;
    }
    if (!pace->start)
        pace->start = now_ns();
    for (;;) {
        uint64_t at = pace->start + ++pace->tick * TICK_NS;
        uint64_t want = (at - pace->start) * options.rate / 1000000000u - pace->sent;
        struct timespec t = {(time_t)(at / 1000000000u), (long)(at % 1000000000u)};

        if (at > now_ns())
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
        if (!want)
            continue;
        if (want > BATCH_MAX)
            want = BATCH_MAX;
        pace->sent += want;
        *due = at;
        return (unsigned)want;
    }
}

/* ---- the four threads ---- */

bool write_all(int fd, const unsigned char *bytes, size_t length) {
    while (length) {
        ssize_t n = write(fd, bytes, length);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        bytes += n;
        length -= (size_t)n;
    }
    return true;
}

void close_notify(void) {
    static const unsigned char alert[2] = {1, 0};
    unsigned char record[2 + RECORD_OVERHEAD];

    write_all(options.tls_fd, record, record_seal(&session.seal, RECORD_ALERT, alert, 2, record));
    shutdown(options.tls_fd, SHUT_WR);
}

static void *send_records(void *unused) {
    unsigned char *out = malloc(BATCH_MAX * (options.size + RECORD_OVERHEAD)), *packet = malloc(options.size);
    struct pace pace = {0};
    uint64_t sequence = 0, due;

    (void)unused;
    if (!out || !packet)
        die("out of memory");
    fill_packet(packet);
    while (!stopping) {
        unsigned count = pace_next(&pace, &due);
        size_t used = 0;

        for (unsigned i = 0; i < count; i++) {
            stamp(packet, sequence++, due);
            used += record_seal(&session.seal, RECORD_DATA, packet, options.size, out + used);
        }
        if (!write_all(options.tls_fd, out, used))
            break;
    }
    close_notify();
    return NULL;
}

void each_packet(void (*take)(const unsigned char *packet, size_t length, uint64_t now)) {
    unsigned char *in = malloc(READ_SIZE + RECORD_MAX), *plain = malloc(RECORD_PLAIN_MAX);
    size_t have = 0;

    if (!in || !plain)
        die("out of memory");
    for (;;) {
        ssize_t n = read(options.tls_fd, in + have, READ_SIZE);
        size_t at = 0, took, length;
        uint64_t now;
        int type;

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return;
        now = now_ns();
        have += (size_t)n;
        while ((took = record_open(&session.open, in + at, have - at, &type, plain, &length))) {
            at += took;
            if (type == RECORD_DATA)
                take(plain, length, now);
        }
        memmove(in, in + at, have - at);
        have -= at;
    }
}

static void take_record(const unsigned char *packet, size_t length, uint64_t now) {
    static uint64_t next;

    take(&encapsulated, packet, length, &next, now);
    add(&encapsulated.packets, 1);
}

static void *read_records(void *unused) {
    (void)unused;
    each_packet(take_record);
    return NULL;
}

static void *send_datagrams(void *unused) {
    unsigned char *packets = malloc(BATCH_MAX * options.size);
    struct mmsghdr messages[BATCH_MAX] = {0};
    struct iovec parts[BATCH_MAX];
    struct pace pace = {0};
    uint64_t sequence = 0, due;

    (void)unused;
    if (!packets)
        die("out of memory");
    for (unsigned i = 0; i < BATCH_MAX; i++) {
        fill_packet(packets + i * options.size);
        parts[i] = (struct iovec){packets + i * options.size, options.size};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    while (!stopping) {
        unsigned count = pace_next(&pace, &due), done = 0;

        for (unsigned i = 0; i < count; i++)
            stamp(packets + i * options.size, sequence++, due);
        while (done < count) {
            int n = sendmmsg(options.packet_fd, messages + done, count - done, 0);

            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                return NULL;
            done += (unsigned)n;
        }
    }
    return NULL;
}

static void *read_datagrams(void *unused) {
    /* The head of each packet is enough: the kernel reports the whole length, and copying is not our work. */
    static unsigned char heads[BATCH_MAX][SNAP];
    struct mmsghdr messages[BATCH_MAX] = {0};
    struct iovec parts[BATCH_MAX];
    uint64_t next = 0;

    (void)unused;
    for (unsigned i = 0; i < BATCH_MAX; i++) {
        parts[i] = (struct iovec){heads[i], SNAP};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    for (;;) {
        int n = recvmmsg(options.packet_fd, messages, BATCH_MAX, MSG_WAITFORONE | MSG_TRUNC, NULL);
        uint64_t now;

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return NULL;
        now = now_ns();
        for (int i = 0; i < n; i++)
            take(&decapsulated, heads[i], messages[i].msg_len, &next, now);
        add(&decapsulated.packets, (uint64_t)n);
    }
}

/* ---- the run ---- */

static void print_flow(const char *name, const struct flow *flow, uint64_t packets) {
    printf(", \"%s\": {\"packets\": %llu, \"lost\": %llu, \"invalid\": %llu, \"p50_ns\": %llu, \"p99_ns\": %llu, "
           "\"max_ns\": %llu}",
           name, (unsigned long long)packets, (unsigned long long)flow->lost, (unsigned long long)flow->invalid,
           (unsigned long long)percentile(flow, 0.5), (unsigned long long)percentile(flow, 0.99),
           (unsigned long long)percentile(flow, 1.0));
}

static void pause_for(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};

    while (clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t) == EINTR)
        ;
}

static pthread_t start(void *(*run)(void *)) {
    pthread_t thread;

    if (pthread_create(&thread, NULL, run, NULL))
        die("cannot start a thread");
    return thread;
}

static void measure(bool records, bool datagrams, bool tcp) {
    uint64_t began, pump, own, out_of_tls, out_of_packets;
    pthread_t sender = 0;
    double seconds;

    record_accept(options.tls_fd, options.key_length ? options.key : NULL, options.key_length, &session);
    if (tcp) {
        start(read_tcp_records);
        sender = start(send_tcp_records);
    }
    if (records) {
        start(read_datagrams);
        sender = start(send_records);
    }
    if (datagrams) {
        start(send_datagrams);
        start(read_records);
    }
    pause_for(options.warm);
    pump = cpu_ns(options.pump);
    own = cpu_ns(0);
    began = now_ns();
    out_of_packets = decapsulated.packets;
    out_of_tls = encapsulated.packets;
    recording = true;
    pause_for(options.seconds);
    recording = false;
    out_of_packets = decapsulated.packets - out_of_packets;
    out_of_tls = encapsulated.packets - out_of_tls;
    seconds = (double)(now_ns() - began) * 1e-9;
    printf("{\"seconds\": %.6f, \"pump_cpu_seconds\": %.6f, \"load_cpu_seconds\": %.6f", seconds,
           (double)(cpu_ns(options.pump) - pump) * 1e-9, (double)(cpu_ns(0) - own) * 1e-9);
    print_flow("decapsulated", &decapsulated, out_of_packets);
    print_flow("encapsulated", &encapsulated, out_of_tls);
    if (tcp)
        print_tcp_counters();
    printf("}\n");
    fflush(stdout);
    stopping = true;
    if (!sender)
        close_notify();
    /* The sender says good-bye when its last batch is out. A pump that no longer reads must not hold us. */
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += 1;
    if (sender)
        pthread_timedjoin_np(sender, NULL, &limit);
    _exit(0);
}

static void discard(int port) {
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_addr = in6addr_any};
    int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, room = 16 << 20;
    static char dropped[READ_SIZE];

    address.sin6_port = htons((uint16_t)port);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listener, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
        die_errno("cannot listen");
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

        if (fd < 0)
            continue;
        while (recv(fd, dropped, sizeof dropped, MSG_TRUNC) > 0)
            ;
        close(fd);
    }
}

static void parse_key(const char *hex) {
    size_t length = strlen(hex) / 2;

    if (!length || length > sizeof options.key)
        die("--key takes 1 to %zu bytes of hex", sizeof options.key);
    for (size_t i = 0; i < length; i++) {
        unsigned byte;

        if (sscanf(hex + 2 * i, "%2x", &byte) != 1)
            die("--key is not hex");
        options.key[i] = (unsigned char)byte;
    }
    options.key_length = length;
}

int main(int count, char **arguments) {
    static const struct option names[] = {
        {"mode", 1, 0, 'm'},  {"tls-fd", 1, 0, 't'}, {"packet-fd", 1, 0, 'd'}, {"pump", 1, 0, 'p'},
        {"size", 1, 0, 'n'},  {"rate", 1, 0, 'r'},   {"batch", 1, 0, 'b'},     {"warm", 1, 0, 'w'},
        {"seconds", 1, 0, 's'}, {"key", 1, 0, 'k'},  {"port", 1, 0, 'o'},      {0},
    };
    const char *mode = "";
    int choice, port = 0;

    while ((choice = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (choice) {
        case 'm': mode = optarg; break;
        case 't': options.tls_fd = atoi(optarg); break;
        case 'd': options.packet_fd = atoi(optarg); break;
        case 'p': options.pump = atoi(optarg); break;
        case 'n': options.size = (size_t)atol(optarg); break;
        case 'r': options.rate = (uint64_t)atoll(optarg); break;
        case 'b': options.batch = (unsigned)atoi(optarg); break;
        case 'w': options.warm = atof(optarg); break;
        case 's': options.seconds = atof(optarg); break;
        case 'k': parse_key(optarg); break;
        case 'o': port = atoi(optarg); break;
        default: return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1);
    if (!strcmp(mode, "discard"))
        discard(port);
    if (options.size < PACKET_MIN || options.size > RECORD_PLAIN_MAX || !options.batch ||
        options.batch > BATCH_MAX || options.tls_fd < 0)
        die("--size is %d to %d, --batch 1 to %d, --tls-fd an open socket", PACKET_MIN, RECORD_PLAIN_MAX,
            BATCH_MAX);
    if (!strcmp(mode, "receive"))
        measure(true, false, false);
    if (!strcmp(mode, "send"))
        measure(false, true, false);
    if (!strcmp(mode, "both"))
        measure(true, true, false);
    if (!strcmp(mode, "tcp"))
        measure(false, false, true);
    die("--mode is receive, send, both, tcp or discard");
}
