/*
 * Peer: the forwarder that add-ons ship, TUN <-> TLS 1.2 PSK over TCP, with two threads and OpenSSL.
 *
 *     forwarder --tun NAME --key HEX --listen ADDRESS --port PORT
 *     forwarder --tun NAME --key HEX --connect ADDRESS --port PORT
 *
 * Each packet goes by itself: one read of the TUN, one SSL_write, one record, one write to the socket; one
 * SSL_read, one write to the TUN. Packets are bare IPv4 or IPv6, put together again by their own length. Within
 * that it is not slow on purpose: many records come with one read of the socket, Nagle is off, and the lock that
 * an SSL object needs between two threads is never held during a system call. (With OpenSSL's own socket BIO it
 * would be, and that costs a quarter of the throughput.)
 */
#define _GNU_SOURCE
#include "peer.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

enum { READ_SIZE = 256 * 1024, PACKET_MAX = 16384, RECORD_ROOM = PACKET_MAX + 64, CONNECT_TRIES = 100 };

static SSL *ssl;
static int tls_fd, tun_fd;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int open_tun(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

    if (fd < 0)
        die_errno("/dev/net/tun");
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (ioctl(fd, TUNSETIFF, &request))
        die_errno(name);
    return fd;
}

static int open_connection(const struct sockaddr_in *address, bool server) {
    struct timespec pause = {0, 50000000};
    int on = 1, fd;

    if (server) {
        int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(listener, (const struct sockaddr *)address, sizeof *address) || listen(listener, 1))
            die_errno("cannot listen");
        fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            die_errno("cannot accept");
        close(listener);
    } else {
        for (int i = 0;; i++) {
            fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (!connect(fd, (const struct sockaddr *)address, sizeof *address))
                break;
            if (i == CONNECT_TRIES)
                die_errno("cannot connect");
            close(fd);
            nanosleep(&pause, NULL);
        }
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
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

/* Fills the buffer from the socket; 0 at the end of the stream. */
static size_t read_some(unsigned char *bytes, size_t room) {
    ssize_t n;

    do
        n = read(tls_fd, bytes, room);
    while (n < 0 && errno == EINTR);
    return n > 0 ? (size_t)n : 0;
}

static void *encapsulate(void *unused) {
    static unsigned char packet[PACKET_MAX], record[RECORD_ROOM];

    (void)unused;
    for (;;) {
        ssize_t length = read(tun_fd, packet, sizeof packet);
        int sealed;

        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            exit(0);
        pthread_mutex_lock(&lock);
        if (SSL_write(ssl, packet, (int)length) <= 0)
            die("cannot encrypt");
        sealed = BIO_read(SSL_get_wbio(ssl), record, sizeof record);
        pthread_mutex_unlock(&lock);
        write_all(record, (size_t)sealed);
    }
}

/* The length of the packet that starts here, 0 when its header is not complete. */
static size_t packet_length(const unsigned char *packet, size_t have) {
    if (!have)
        return 0;
    switch (packet[0] >> 4) {
    case 4: return have < 4 ? 0 : (size_t)packet[2] << 8 | packet[3];
    case 6: return have < 6 ? 0 : 40 + ((size_t)packet[4] << 8 | packet[5]);
    default: die("what came is not an IP packet");
    }
}

/* Writes the whole packets of the plain text to the TUN; gives what is left of it. */
static size_t write_packets(unsigned char *plain, size_t have) {
    size_t at = 0, length;

    while ((length = packet_length(plain + at, have - at)) && length <= have - at) {
        /* EIO: the device is down. A TUN may refuse or drop a packet; the tunnel goes on. */
        if (write(tun_fd, plain + at, length) < 0 && errno != EINVAL && errno != ENOBUFS && errno != EIO)
            die_errno("cannot write to the TUN");
        at += length;
    }
    memmove(plain, plain + at, have - at);
    return have - at;
}

static void decapsulate(void) {
    static unsigned char cipher[READ_SIZE], plain[READ_SIZE + 2 * 65536];
    size_t have = 0, came;

    while ((came = read_some(cipher, sizeof cipher))) {
        int n;

        pthread_mutex_lock(&lock);
        BIO_write(SSL_get_rbio(ssl), cipher, (int)came);
        while ((n = SSL_read(ssl, plain + have, (int)(sizeof plain - have))) > 0)
            have += (size_t)n;
        if (SSL_get_error(ssl, n) != SSL_ERROR_WANT_READ)
            exit(0);
        pthread_mutex_unlock(&lock);
        have = write_packets(plain, have);
    }
}

static void handshake(void) {
    unsigned char bytes[PACKET_MAX];

    for (;;) {
        int done = SSL_do_handshake(ssl), length = BIO_read(SSL_get_wbio(ssl), bytes, sizeof bytes);
        size_t came;

        if (length > 0)
            write_all(bytes, (size_t)length);
        if (done == 1)
            return;
        if (SSL_get_error(ssl, done) != SSL_ERROR_WANT_READ || !(came = read_some(bytes, sizeof bytes)))
            die("handshake failed");
        BIO_write(SSL_get_rbio(ssl), bytes, (int)came);
    }
}

int main(int count, char **arguments) {
    static const struct option names[] = {{"tun", 1, 0, 't'},     {"key", 1, 0, 'k'},  {"listen", 1, 0, 'l'},
                                          {"connect", 1, 0, 'c'}, {"port", 1, 0, 'p'}, {0}};
    struct sockaddr_in address = {.sin_family = AF_INET};
    const char *tun = "", *host = "";
    bool server = false;
    pthread_t thread;
    int choice;

    while ((choice = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (choice) {
        case 't': tun = optarg; break;
        case 'k': parse_key(optarg); break;
        case 'l': host = optarg, server = true; break;
        case 'c': host = optarg; break;
        case 'p': address.sin_port = htons((uint16_t)atoi(optarg)); break;
        default: return 2;
        }
    }
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1 || !peer_key_length)
        die("--listen or --connect takes an IPv4 address, --key a key in hex");
    signal(SIGPIPE, SIG_IGN);
    tun_fd = open_tun(tun);
    tls_fd = open_connection(&address, server);
    ssl = peer_session(server);
    SSL_set_bio(ssl, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    BIO_set_mem_eof_return(SSL_get_rbio(ssl), -1);
    handshake();
    printf("ready\n");
    fflush(stdout);
    if (pthread_create(&thread, NULL, encapsulate, NULL))
        die("cannot start a thread");
    decapsulate();
    return 0;
}
