/* The handshake and the records of the load programs: see record.h. */
#include "record.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const unsigned char *psk_key;
static size_t psk_length;

void die(const char *format, ...) {
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    ERR_print_errors_fp(stderr);
    exit(1);
}

void die_errno(const char *what) {
    die("%s: %s", what, strerror(errno));
}

static unsigned on_psk(SSL *ssl, const char *identity, unsigned char *out, unsigned room) {
    (void)ssl;
    (void)identity;
    if (psk_length > room)
        return 0;
    memcpy(out, psk_key, psk_length);
    return (unsigned)psk_length;
}

/* A self-signed certificate that lives as long as this process. */
static void use_throw_away_certificate(SSL_CTX *context) {
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    X509_NAME *name;

    if (!key || !certificate)
        die("cannot make a key");
    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 86400);
    X509_set_pubkey(certificate, key);
    name = X509_get_subject_name(certificate);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"bench", -1, -1, 0);
    X509_set_issuer_name(certificate, name);
    if (!X509_sign(certificate, key, EVP_sha256()) || SSL_CTX_use_certificate(context, certificate) != 1 ||
        SSL_CTX_use_PrivateKey(context, key) != 1)
        die("cannot use the throw-away certificate");
    X509_free(certificate);
    EVP_PKEY_free(key);
}

/* RFC 5246, 6.3: key_block = PRF(master_secret, "key expansion", server_random + client_random). */
static void expand_keys(SSL *ssl, unsigned char *block, size_t length) {
    unsigned char master[64], seed[13 + 64];
    size_t master_length = SSL_SESSION_get_master_key(SSL_get_session(ssl), master, sizeof master);
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "TLS1-PRF", NULL);
    EVP_KDF_CTX *context = EVP_KDF_CTX_new(kdf);
    OSSL_PARAM parameters[4];

    memcpy(seed, "key expansion", 13);
    SSL_get_server_random(ssl, seed + 13, 32);
    SSL_get_client_random(ssl, seed + 45, 32);
    parameters[0] = OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, "SHA384", 0);
    parameters[1] = OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SECRET, master, master_length);
    parameters[2] = OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SEED, seed, sizeof seed);
    parameters[3] = OSSL_PARAM_construct_end();
    if (!context || EVP_KDF_derive(context, block, length, parameters) != 1)
        die("cannot derive the record keys");
    EVP_KDF_CTX_free(context);
    EVP_KDF_free(kdf);
}

static void set_keys(struct record_half *half, const unsigned char *key, const unsigned char *salt, int seal) {
    half->cipher = EVP_CIPHER_CTX_new();
    if (!half->cipher || EVP_CipherInit_ex(half->cipher, EVP_aes_256_gcm(), NULL, key, NULL, seal) != 1)
        die("cannot set a record key");
    memcpy(half->salt, salt, sizeof half->salt);
    half->sequence = 1; /* record 0 of each direction was its Finished */
}

void record_accept(int fd, const unsigned char *key, size_t key_length, struct record_session *session) {
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    unsigned char block[2 * 32 + 2 * 4]; /* client key, server key, client salt, server salt */
    SSL *ssl;

    if (!context)
        die("cannot make a TLS context");
    SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_max_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
    psk_key = key;
    psk_length = key_length;
    if (key) {
        SSL_CTX_set_cipher_list(context, "PSK-AES256-GCM-SHA384");
        SSL_CTX_set_psk_server_callback(context, on_psk);
    } else {
        SSL_CTX_set_cipher_list(context, "ECDHE-ECDSA-AES256-GCM-SHA384");
        use_throw_away_certificate(context);
    }
    ssl = SSL_new(context);
    if (!ssl || SSL_set_fd(ssl, fd) != 1 || SSL_accept(ssl) != 1)
        die("the pump under test did not complete the TLS handshake");
    /* Without read-ahead OpenSSL has taken exactly the handshake from the socket: the rest is ours. */
    expand_keys(ssl, block, sizeof block);
    set_keys(&session->open, block, block + 64, 0);
    set_keys(&session->seal, block + 32, block + 68, 1);
    SSL_set_quiet_shutdown(ssl, 1);
    SSL_free(ssl);
    SSL_CTX_free(context);
}

static void put64(unsigned char *out, uint64_t value) {
    for (int i = 7; i >= 0; i--, value >>= 8)
        out[i] = (unsigned char)value;
}

static void put_header(unsigned char *out, int type, size_t length) {
    out[0] = (unsigned char)type;
    out[1] = 3;
    out[2] = 3;
    out[3] = (unsigned char)(length >> 8);
    out[4] = (unsigned char)length;
}

/* The additional data of RFC 5288: sequence number, then the header with the plain text's length. */
static void additional_data(unsigned char *out, uint64_t sequence, int type, size_t length) {
    put64(out, sequence);
    put_header(out + 8, type, length);
}

size_t record_seal(struct record_half *half, int type, const unsigned char *plain, size_t length,
                   unsigned char *out) {
    unsigned char nonce[12], extra[13];
    unsigned char *body = out + RECORD_HEADER + RECORD_NONCE;
    int n;

    put_header(out, type, length + RECORD_NONCE + RECORD_TAG);
    put64(out + RECORD_HEADER, half->sequence);
    memcpy(nonce, half->salt, 4);
    memcpy(nonce + 4, out + RECORD_HEADER, RECORD_NONCE);
    additional_data(extra, half->sequence++, type, length);
    if (EVP_EncryptInit_ex(half->cipher, NULL, NULL, NULL, nonce) != 1 ||
        EVP_EncryptUpdate(half->cipher, NULL, &n, extra, sizeof extra) != 1 ||
        EVP_EncryptUpdate(half->cipher, body, &n, plain, (int)length) != 1 ||
        EVP_EncryptFinal_ex(half->cipher, body + n, &n) != 1 ||
        EVP_CIPHER_CTX_ctrl(half->cipher, EVP_CTRL_GCM_GET_TAG, RECORD_TAG, body + length) != 1)
        die("cannot seal a record");
    return length + RECORD_OVERHEAD;
}

size_t record_open(struct record_half *half, const unsigned char *in, size_t available, int *type,
                   unsigned char *plain, size_t *length) {
    unsigned char nonce[12], extra[13];
    const unsigned char *body = in + RECORD_HEADER + RECORD_NONCE;
    size_t total, inner;
    int n;

    if (available < RECORD_HEADER)
        return 0;
    total = RECORD_HEADER + ((size_t)in[3] << 8 | in[4]);
    if (total < RECORD_OVERHEAD || total > RECORD_MAX)
        die("the pump under test sent a record of %zu bytes", total);
    if (available < total)
        return 0;
    inner = total - RECORD_OVERHEAD;
    memcpy(nonce, half->salt, 4);
    memcpy(nonce + 4, in + RECORD_HEADER, RECORD_NONCE);
    additional_data(extra, half->sequence++, in[0], inner);
    if (EVP_DecryptInit_ex(half->cipher, NULL, NULL, NULL, nonce) != 1 ||
        EVP_DecryptUpdate(half->cipher, NULL, &n, extra, sizeof extra) != 1 ||
        EVP_DecryptUpdate(half->cipher, plain, &n, body, (int)inner) != 1 ||
        EVP_CIPHER_CTX_ctrl(half->cipher, EVP_CTRL_GCM_SET_TAG, RECORD_TAG, (void *)(body + inner)) != 1 ||
        EVP_DecryptFinal_ex(half->cipher, plain + n, &n) != 1)
        die("a record from the pump under test does not authenticate");
    *type = in[0];
    *length = inner;
    return total;
}
