/* What the C peers share: errors, arguments, and the TLS session. A header, so that each is one compiler call. */
#ifndef SAPPER_BENCH_PEER_H
#define SAPPER_BENCH_PEER_H

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned char peer_key[64];
static size_t peer_key_length;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    ERR_print_errors_fp(stderr);
    exit(1);
}

__attribute__((noreturn, unused)) static void die_errno(const char *what) {
    die("%s: %s", what, strerror(errno));
}

static void parse_key(const char *hex) {
    size_t length = strlen(hex) / 2;

    if (length > sizeof peer_key)
        die("--key takes at most %zu bytes of hex", sizeof peer_key);
    for (size_t i = 0; i < length; i++) {
        unsigned byte;

        if (sscanf(hex + 2 * i, "%2x", &byte) != 1)
            die("--key is not hex");
        peer_key[i] = (unsigned char)byte;
    }
    peer_key_length = length;
}

static unsigned peer_psk_client(SSL *ssl, const char *hint, char *identity, unsigned room, unsigned char *key,
                                unsigned key_room) {
    (void)ssl;
    (void)hint;
    if (room < 6 || key_room < peer_key_length)
        return 0;
    memcpy(identity, "bench", 6);
    memcpy(key, peer_key, peer_key_length);
    return (unsigned)peer_key_length;
}

__attribute__((unused)) static unsigned peer_psk_server(SSL *ssl, const char *identity, unsigned char *key,
                                                        unsigned key_room) {
    (void)ssl;
    if (strcmp(identity, "bench") || key_room < peer_key_length)
        return 0;
    memcpy(key, peer_key, peer_key_length);
    return (unsigned)peer_key_length;
}

/* TLS 1.2 with AES-256-GCM: by pre-shared key, or (clients) with an unverified certificate. */
static SSL_CTX *peer_context(bool server) {
    SSL_CTX *context = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());

    if (!context)
        die("cannot make a TLS context");
    SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_max_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_set_cipher_list(context, peer_key_length ? "PSK-AES256-GCM-SHA384" : "ECDHE-ECDSA-AES256-GCM-SHA384");
    if (peer_key_length && server)
        SSL_CTX_set_psk_server_callback(context, peer_psk_server);
    else if (peer_key_length)
        SSL_CTX_set_psk_client_callback(context, peer_psk_client);
    return context;
}

__attribute__((unused)) static SSL *peer_session(bool server) {
    SSL *ssl = SSL_new(peer_context(server));

    if (!ssl)
        die("cannot make a TLS session");
    if (server)
        SSL_set_accept_state(ssl);
    else
        SSL_set_connect_state(ssl);
    return ssl;
}

#endif
