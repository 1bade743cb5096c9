/*
 * One TCP flow inside the packets: the sending half of TCP, as far as a lossless path into a TUN needs it.
 *
 * The other end is a real socket behind the pump's TUN (load --mode discard). The handshake, the receiver's
 * window and its acknowledgements are real, so that what the pump writes costs the kernel what a user's TCP
 * costs it, and what it may coalesce looks as a sender's offloaded segments look: one flow, full segments,
 * timestamps, PSH on the last of a burst. There is no congestion control, since there is no congestion; after
 * 200 ms without progress everything that is not acknowledged is sent again, and counted.
 */
#define _GNU_SOURCE
#include "load.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    IP = 40,
    TCP = 32, /* with the timestamp option */
    PORT = 5001,
    SYN = 2,
    PSH = 8,
    ACK = 16,
    STALL_NS = 200000000,
};

/* The receiver's state as its last segment told it. Guarded by `lock`; the sender sleeps on `moved`. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static uint32_t acknowledged, window;
static uint64_t acknowledged_bytes, resent, acknowledgements;
static unsigned window_shift;
static bool established;

/* What the sender puts into each segment, read without the lock. */
static _Atomic uint32_t peer_stamp, peer_next;
static _Atomic bool closed;

static const unsigned char ours[16] = {[0] = 0xfd, [1] = 0x5a, [15] = 2};
static const unsigned char theirs[16] = {[0] = 0xfd, [1] = 0x5a, [15] = 1};

static void put16(unsigned char *out, uint32_t value) {
    out[0] = (unsigned char)(value >> 8);
    out[1] = (unsigned char)value;
}

static void put32(unsigned char *out, uint32_t value) {
    put16(out, value >> 16);
    put16(out + 2, value);
}

static uint32_t get32(const unsigned char *in) {
    return (uint32_t)in[0] << 24 | (uint32_t)in[1] << 16 | (uint32_t)in[2] << 8 | in[3];
}

static uint32_t sum(const unsigned char *bytes, size_t length, uint32_t start) {
    for (size_t i = 0; i + 1 < length; i += 2)
        start += (uint32_t)bytes[i] << 8 | bytes[i + 1];
    if (length & 1)
        start += (uint32_t)bytes[length - 1] << 8;
    return start;
}

static uint16_t fold(uint32_t value) {
    while (value >> 16)
        value = (value & 0xffff) + (value >> 16);
    return (uint16_t)value;
}

/* The addresses, ports and other bytes that are the same in each segment. */
static void prepare(unsigned char *packet, size_t size) {
    memset(packet, 0, IP + TCP);
    memset(packet + IP + TCP, 0x5a, size - IP - TCP);
    packet[0] = 0x60;
    packet[6] = 6;
    packet[7] = 64;
    memcpy(packet + 8, ours, 16);
    memcpy(packet + 24, theirs, 16);
    put16(packet + IP, (uint32_t)(30000 + getpid() % 30000));
    put16(packet + IP + 2, PORT);
}

/* Completes the segment in `packet`, whose payload has the sum `payload_sum`. Returns the packet's size. */
static size_t finish(unsigned char *packet, uint32_t sequence, int flags, const unsigned char *choices,
                     size_t choices_length, size_t payload, uint32_t payload_sum) {
    unsigned char *tcp = packet + IP;
    size_t header = 20 + choices_length, length = header + payload;
    uint32_t total;

    put16(packet + 4, (uint32_t)length);
    put32(tcp + 4, sequence);
    put32(tcp + 8, flags & ACK ? peer_next : 0);
    tcp[12] = (unsigned char)(header / 4 << 4);
    tcp[13] = (unsigned char)flags;
    put16(tcp + 14, 65535);
    put16(tcp + 16, 0);
    memcpy(tcp + 20, choices, choices_length);
    total = sum(packet + 8, 32, payload_sum + (uint32_t)length + 6);
    put16(tcp + 16, (uint16_t)~fold(sum(tcp, header, total)));
    return IP + length;
}

static uint32_t clock_ms(void) {
    return (uint32_t)(now_ns() / 1000000);
}

/* Sends SYN until the receiver's answer came, then leaves the acknowledgement to the first data. */
static void open_connection(unsigned char *packet, uint32_t sequence, size_t segment) {
    unsigned char record[RECORD_MAX], choices[20] = {2, 4, 0, 0, 3, 3, 10, 1, 8, 10, [18] = 1, [19] = 1};
    size_t size;

    put16(choices + 2, (uint32_t)segment + 12);
    for (int attempt = 0; attempt < 10; attempt++) {
        struct timespec limit;
        bool done;

        put32(choices + 10, clock_ms());
        size = finish(packet, sequence, SYN, choices, sizeof choices, 0, 0);
        if (!write_all(options.tls_fd, record, record_seal(&session.seal, RECORD_DATA, packet, size, record)))
            die("the pump under test closed the connection");
        clock_gettime(CLOCK_MONOTONIC, &limit);
        limit.tv_sec += 1;
        pthread_mutex_lock(&lock);
        while (!established && !pthread_cond_clockwait(&moved, &lock, CLOCK_MONOTONIC, &limit))
            ;
        done = established;
        pthread_mutex_unlock(&lock);
        if (done)
            return;
    }
    die("no TCP connection through the pump under test: nothing came back from its TUN");
}

/* Waits until a segment fits into the receiver's window. False: nothing moved for long. */
static bool wait_for_room(uint32_t next, size_t segment, uint32_t *room) {
    struct timespec limit;
    bool progress = true;
    uint32_t before;

    clock_gettime(CLOCK_MONOTONIC, &limit);
    limit.tv_nsec += STALL_NS;
    limit.tv_sec += limit.tv_nsec / 1000000000;
    limit.tv_nsec %= 1000000000;
    pthread_mutex_lock(&lock);
    before = acknowledged;
    for (;;) {
        uint32_t used = next - acknowledged;

        *room = window > used ? window - used : 0;
        if (*room >= segment || closed)
            break;
        if (pthread_cond_clockwait(&moved, &lock, CLOCK_MONOTONIC, &limit)) {
            progress = acknowledged != before;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return progress;
}

void *send_tcp_records(void *unused) {
    size_t segment = options.size - IP - TCP;
    unsigned char *packet = malloc(options.size), choices[12] = {1, 1, 8, 10};
    unsigned char *out = malloc(BATCH_MAX * (options.size + RECORD_OVERHEAD));
    uint32_t first = (uint32_t)now_ns(), next = first + 1, payload_sum, room;

    (void)unused;
    if (!packet || !out)
        die("out of memory");
    prepare(packet, options.size);
    acknowledged = first;
    open_connection(packet, first, segment);
    prepare(packet, options.size); /* the SYN's options are longer: they ran over the payload */
    payload_sum = fold(sum(packet + IP + TCP, segment, 0));
    while (!stopping && !closed) {
        unsigned count;
        size_t used = 0;

        if (!wait_for_room(next, segment, &room)) {
            pthread_mutex_lock(&lock);
            resent += (next - acknowledged) / segment;
            next = acknowledged;
            pthread_mutex_unlock(&lock);
            continue;
        }
        count = room / segment < options.batch ? (unsigned)(room / segment) : options.batch;
        put32(choices + 4, clock_ms());
        put32(choices + 8, peer_stamp);
        for (unsigned i = 0; i < count; i++) {
            size_t size = finish(packet, next, ACK | (i + 1 == count ? PSH : 0), choices, sizeof choices, segment,
                                 payload_sum);

            used += record_seal(&session.seal, RECORD_DATA, packet, size, out + used);
            next += (uint32_t)segment;
        }
        if (!write_all(options.tls_fd, out, used))
            break;
    }
    close_notify();
    return NULL;
}

/* Finds the window scale of a SYN's options and every segment's timestamp. */
static void read_choices(const unsigned char *choices, size_t length, bool syn) {
    for (size_t i = 0; i < length;) {
        size_t size = choices[i] <= 1 ? 1 : i + 1 < length ? choices[i + 1] : 0;

        if (!choices[i] || !size || i + size > length)
            return;
        if (choices[i] == 3 && syn && size == 3)
            window_shift = choices[i + 2] < 14 ? choices[i + 2] : 14;
        if (choices[i] == 8 && size == 10)
            peer_stamp = get32(choices + i + 2);
        i += size;
    }
}

static void take_segment(const unsigned char *packet, size_t length, uint64_t now) {
    const unsigned char *tcp = packet + IP;
    size_t header;
    uint32_t window_now;
    bool syn;

    (void)now;
    /* The TUN's own noise (router solicitations, multicast reports) comes by here as well. */
    if (length < IP + 20 || packet[0] >> 4 != 6 || packet[6] != 6 || memcmp(packet + 24, ours, 16))
        return;
    header = (size_t)(tcp[12] >> 4) * 4;
    if (header < 20 || IP + header > length)
        return;
    syn = tcp[13] & SYN;
    pthread_mutex_lock(&lock);
    if (tcp[13] & 5) /* FIN or RST */
        closed = true;
    read_choices(tcp + 20, header - 20, syn);
    window_now = (uint32_t)(tcp[14] << 8 | tcp[15]);
    if (syn) {
        peer_next = get32(tcp + 4) + 1;
        window = window_now;
        established = true;
    } else {
        window = window_now << window_shift;
        acknowledgements++;
    }
    if ((int32_t)(get32(tcp + 8) - acknowledged) > 0) {
        uint32_t step = get32(tcp + 8) - acknowledged;

        acknowledged += step;
        acknowledged_bytes += step;
        decapsulated.packets = acknowledged_bytes / (options.size - IP - TCP);
    }
    pthread_cond_signal(&moved);
    pthread_mutex_unlock(&lock);
}

void *read_tcp_records(void *unused) {
    (void)unused;
    each_packet(take_segment);
    return NULL;
}

void print_tcp_counters(void) {
    pthread_mutex_lock(&lock);
    printf(", \"resent\": %llu, \"acknowledgements\": %llu, \"packets_in_all\": %llu", (unsigned long long)resent,
           (unsigned long long)acknowledgements,
           (unsigned long long)(acknowledged_bytes / (options.size - IP - TCP)));
    pthread_mutex_unlock(&lock);
}
