/* What the parts of the load program share: the run's options, its counters and its clocks. */
#ifndef SAPPER_BENCH_LOAD_H
#define SAPPER_BENCH_LOAD_H

#include "record.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum { PACKET_MIN = 96, BATCH_MAX = 256, READ_SIZE = 256 * 1024 };

/* A log-linear histogram of nanoseconds: 64 steps in each power of two, so a value is right within 1.6 %. */
enum { STEP_BITS = 6, BUCKETS = (64 - STEP_BITS + 1) << STEP_BITS };

/* One direction's counters. One thread writes them, the main thread reads them at both ends of the window. */
struct flow {
    _Atomic uint64_t packets;
    _Atomic uint64_t lost;    /* gaps in the sequence numbers */
    _Atomic uint64_t invalid; /* not one whole packet of the expected size, or out of order */
    uint64_t latency[BUCKETS];
};

struct options {
    int tls_fd, packet_fd;
    size_t size;         /* bytes of a packet, IPv6 header included */
    unsigned batch;      /* packets of one write at full speed */
    uint64_t rate;       /* packets per second and direction, 0: as fast as it goes */
    double warm, seconds;
    pid_t pump;
    unsigned char key[64];
    size_t key_length;   /* 0: certificates */
};

extern struct options options;
extern struct record_session session;
extern struct flow decapsulated; /* what came out of the pump's packet side */
extern struct flow encapsulated; /* what came out of the pump's TLS side */
extern _Atomic bool recording;   /* inside the measured window */
extern _Atomic bool stopping;

uint64_t now_ns(void);
uint64_t cpu_ns(pid_t pid); /* 0: this process */
void record_latency(struct flow *flow, uint64_t nanoseconds, uint64_t count);
uint64_t percentile(const struct flow *flow, double part);

/* Writes all of it to a blocking socket; false when the other end is gone. */
bool write_all(int fd, const unsigned char *bytes, size_t length);
/* Seals and writes close_notify. Only for the thread that owns the sealing half. */
void close_notify(void);

/* Reads records until the pump closes, and hands over the plain text of each and the time of its read. */
void each_packet(void (*take)(const unsigned char *packet, size_t length, uint64_t now));

/* The threads of a run with a TCP flow inside (inner_tcp.c). */
void *send_tcp_records(void *);
void *read_tcp_records(void *);
void print_tcp_counters(void);

#endif
