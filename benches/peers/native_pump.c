/*
 * Reference: what C with OpenSSL and batched datagram calls reaches, as an upper bound beside the pumps.
 *
 *     native_pump --tls-fd N --packet-fd N --key HEX
 *
 * One thread per direction. Large reads feed a memory BIO, each record is one packet, datagrams go and come 64
 * at a time. The SSL object is locked for a batch of records, never during a system call.
 */
#define _GNU_SOURCE
#include "peer.h"

#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>

enum { BATCH = 64, READ_SIZE = 256 * 1024, PACKET_MAX = 16384 };

static SSL *ssl;
static int tls_fd = -1, packet_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct batch {
    struct mmsghdr messages[BATCH];
    struct iovec parts[BATCH];
    unsigned char *packets;
};

static void make_batch(struct batch *batch) {
    memset(batch->messages, 0, sizeof batch->messages);
    batch->packets = malloc((size_t)BATCH * PACKET_MAX);
    if (!batch->packets)
        die("out of memory");
    for (int i = 0; i < BATCH; i++) {
        batch->parts[i] = (struct iovec){batch->packets + (size_t)i * PACKET_MAX, PACKET_MAX};
        batch->messages[i].msg_hdr = (struct msghdr){.msg_iov = &batch->parts[i], .msg_iovlen = 1};
    }
}

static void write_all(const unsigned char *bytes, size_t length) {
    while (length) {
        ssize_t n = write(tls_fd, bytes, length);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            exit(0);
        bytes += n;
        length -= (size_t)n;
    }
}

static void send_datagrams(struct batch *batch, int count) {
    for (int done = 0; done < count;) {
        int n = sendmmsg(packet_fd, batch->messages + done, (unsigned)(count - done), 0);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            exit(0);
        done += n;
    }
}

static void *encapsulate(void *unused) {
    struct batch batch;
    unsigned char *out = malloc((size_t)BATCH * (PACKET_MAX + 64));

    (void)unused;
    make_batch(&batch);
    if (!out)
        die("out of memory");
    for (;;) {
        int n = recvmmsg(packet_fd, batch.messages, BATCH, MSG_WAITFORONE, NULL);
        int length;

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return NULL;
        pthread_mutex_lock(&lock);
        for (int i = 0; i < n; i++)
            if (SSL_write(ssl, batch.parts[i].iov_base, (int)batch.messages[i].msg_len) <= 0)
                die("cannot encrypt");
        length = BIO_read(SSL_get_wbio(ssl), out, BATCH * (PACKET_MAX + 64));
        pthread_mutex_unlock(&lock);
        write_all(out, (size_t)length);
    }
}

static void decapsulate(void) {
    struct batch batch;
    unsigned char *in = malloc(READ_SIZE);
    bool more = false;

    make_batch(&batch);
    if (!in)
        die("out of memory");
    for (;;) {
        int count = 0;

        if (!more) {
            ssize_t n = read(tls_fd, in, READ_SIZE);

            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                return;
            pthread_mutex_lock(&lock);
            BIO_write(SSL_get_rbio(ssl), in, (int)n);
        } else {
            pthread_mutex_lock(&lock);
        }
        while (count < BATCH) {
            int n = SSL_read(ssl, batch.parts[count].iov_base, PACKET_MAX);

            if (n <= 0)
                break;
            batch.parts[count++].iov_len = (size_t)n;
        }
        more = count == BATCH;
        if (SSL_get_shutdown(ssl) & SSL_RECEIVED_SHUTDOWN)
            return;
        pthread_mutex_unlock(&lock);
        send_datagrams(&batch, count);
    }
}

static void handshake(void) {
    unsigned char bytes[16384];

    for (;;) {
        int result = SSL_do_handshake(ssl), length = BIO_read(SSL_get_wbio(ssl), bytes, sizeof bytes);
        ssize_t n;

        if (length > 0)
            write_all(bytes, (size_t)length);
        if (result == 1)
            return;
        if (SSL_get_error(ssl, result) != SSL_ERROR_WANT_READ)
            die("handshake failed");
        n = read(tls_fd, bytes, sizeof bytes);
        if (n <= 0)
            die("the other end closed during the handshake");
        BIO_write(SSL_get_rbio(ssl), bytes, (int)n);
    }
}

int main(int count, char **arguments) {
    static const struct option names[] = {
        {"tls-fd", 1, 0, 't'}, {"packet-fd", 1, 0, 'd'}, {"key", 1, 0, 'k'}, {"direction", 1, 0, 'x'}, {0}};
    pthread_t thread;
    int choice;

    while ((choice = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (choice) {
        case 't': tls_fd = atoi(optarg); break;
        case 'd': packet_fd = atoi(optarg); break;
        case 'k': parse_key(optarg); break;
        case 'x': break; /* it always serves both */
        default: return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    ssl = peer_session(false);
    SSL_set_bio(ssl, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    BIO_set_mem_eof_return(SSL_get_rbio(ssl), -1);
    handshake();
    if (pthread_create(&thread, NULL, encapsulate, NULL))
        die("cannot start a thread");
    decapsulate();
    return 0;
}
