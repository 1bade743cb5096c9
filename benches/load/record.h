/*
 * TLS 1.2 AES-256-GCM records for the load programs: a handshake by OpenSSL, then records sealed and opened
 * with the session's own keys.
 *
 * Why not SSL_write and SSL_read: the load sends and reads on the same connection from two threads, and must
 * cost as little as possible of the two cores that it shares with the pump under test. An SSL object is not
 * for two threads; two cipher contexts are.
 *
 * This is not a TLS library. It knows one suite family and no renegotiation, and it runs on loopback only.
 */
#ifndef SAPPER_BENCH_RECORD_H
#define SAPPER_BENCH_RECORD_H

#include <openssl/evp.h>
#include <stddef.h>
#include <stdint.h>

enum {
    RECORD_HEADER = 5,
    RECORD_NONCE = 8,
    RECORD_TAG = 16,
    RECORD_OVERHEAD = RECORD_HEADER + RECORD_NONCE + RECORD_TAG,
    RECORD_PLAIN_MAX = 16384,
    RECORD_MAX = RECORD_PLAIN_MAX + RECORD_OVERHEAD,
    RECORD_ALERT = 21,
    RECORD_DATA = 23,
};

/* One direction of a session. */
struct record_half {
    EVP_CIPHER_CTX *cipher;
    unsigned char salt[4];
    uint64_t sequence;
};

struct record_session {
    struct record_half seal; /* from us to the pump */
    struct record_half open; /* from the pump to us */
};

/*
 * The server's side of a handshake on a connected blocking socket. With a key: PSK-AES256-GCM-SHA384; without
 * one: ECDHE-ECDSA-AES256-GCM-SHA384 and a throw-away certificate. Ends the process with a message when the
 * handshake fails: there is nothing to measure then.
 */
void record_accept(int fd, const unsigned char *key, size_t key_length, struct record_session *session);

/* Seals `length` bytes as one record into `out`, which has room for them and RECORD_OVERHEAD. Returns its size. */
size_t record_seal(struct record_half *half, int type, const unsigned char *plain, size_t length,
                   unsigned char *out);

/*
 * Opens the record at the start of `in`. Returns the number of bytes that it took, 0 when `available` does not
 * hold all of it yet. The type and the plain text's length come back in `type` and `length`. Ends the process
 * when the record does not authenticate.
 */
size_t record_open(struct record_half *half, const unsigned char *in, size_t available, int *type,
                   unsigned char *plain, size_t *length);

/* Print a message (and, the second, errno's text) and end the process with status 1. */
__attribute__((noreturn, format(printf, 1, 2))) void die(const char *format, ...);
__attribute__((noreturn)) void die_errno(const char *what);

#endif
