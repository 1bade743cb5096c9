"""An echo over TLS with a pre-shared key, with nothing but CPython's ssl (3.13 or newer has the call-backs).

Run by a test under another interpreter, so it uses no package: psk_echo.py ROLE PORT VERSION IDENTITY KEY
"""

import socket
import ssl
import sys


def main() -> None:
    role, port, version, identity, key = sys.argv[1:]
    server = role == "server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    if version == "TLSv1.2":
        context.set_ciphers("PSK+AESGCM")
    if server:
        # CPython 3.13 has it.
        context.set_psk_server_callback(  # type: ignore[attr-defined]
            lambda name: bytes.fromhex(key) if (name or "") == identity else b""
        )
        with socket.create_server(("127.0.0.1", int(port))) as listener:
            connection, _ = listener.accept()
    else:
        context.set_psk_client_callback(  # type: ignore[attr-defined]
            lambda _hint: (identity, bytes.fromhex(key))
        )
        connection = socket.create_connection(("127.0.0.1", int(port)), timeout=20)
    connection.settimeout(20)
    with context.wrap_socket(connection, server_side=server) as tls:
        print("agreed on", tls.version(), tls.cipher(), flush=True)
        while data := tls.recv(65536):
            tls.sendall(data)
        # The peer has said its close_notify; ours comes with unwrap.
        tls.unwrap()
    print("orderly end", flush=True)


if __name__ == "__main__":
    main()
