/*
 * hold: the far end of many idle connections. Accepts TCP connections one after another on an inherited
 * listener, answers a TLS handshake on each and keeps them all open and silent until it is ended.
 *
 *     hold --listen-fd N --key HEX                              TLS 1.2 PSK-AES256-GCM-SHA384
 *     hold --listen-fd N --certificate FILE --private-key FILE  certificates, TLS 1.3
 *
 * It is a process of its own so that only one side's memory is counted in the process under test.
 */
#define _GNU_SOURCE
#include "../peers/peer.h"

#include <getopt.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>

int main(int count, char **arguments) {
    static const struct option names[] = {
        {"listen-fd", 1, 0, 'l'}, {"key", 1, 0, 'k'}, {"certificate", 1, 0, 'c'}, {"private-key", 1, 0, 'p'}, {0}};
    const char *certificate = NULL, *private_key = NULL;
    int choice, listener = -1;
    SSL_CTX *context;

    while ((choice = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (choice) {
        case 'l': listener = atoi(optarg); break;
        case 'k': parse_key(optarg); break;
        case 'c': certificate = optarg; break;
        case 'p': private_key = optarg; break;
        default: return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    context = peer_context(true);
    if (certificate) {
        SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION);
        SSL_CTX_set_cipher_list(context, "DEFAULT");
        if (SSL_CTX_use_certificate_chain_file(context, certificate) != 1 ||
            SSL_CTX_use_PrivateKey_file(context, private_key, SSL_FILETYPE_PEM) != 1)
            die("cannot use the certificate");
    }
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        SSL *ssl;

        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            die_errno("cannot accept");
        }
        ssl = SSL_new(context);
        if (!ssl || SSL_set_fd(ssl, fd) != 1 || SSL_accept(ssl) != 1)
            die("a handshake failed");
        /* Kept: the connection stays open as long as this process lives. */
    }
}
