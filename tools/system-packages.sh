#!/bin/sh
# The foreign programs that the tests talk to. Installs what is missing where it may (root, apt-get);
# elsewhere it names what is missing, and the tests that need it are skipped with that reason.
set -u
# program:package
wanted="ip:iproute2 iperf3:iperf3 openssl:openssl gnutls-cli:gnutls-bin nft:nftables socat:socat ping:iputils-ping tcpdump:tcpdump redis-server:redis-server postgres:postgresql psql:postgresql-client mariadbd:mariadb-server dovecot:dovecot-imapd curl:curl tshark:tshark nginx:nginx-light haproxy:haproxy git:git"

packages=""
programs=""
for pair in $wanted; do
    program=${pair%%:*}
    # Some of them are in sbin, or in a folder of their version, which is not on everybody's PATH.
    if ! PATH=$PATH:/usr/sbin:/sbin:$(echo /usr/lib/postgresql/*/bin | tr ' ' ':') command -v "$program" >/dev/null; then
        programs="$programs $program"
        packages="$packages ${pair#*:}"
    fi
done
[ -n "$packages" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing the programs that the tests talk to:$packages"
    export DEBIAN_FRONTEND=noninteractive
    install="apt-get install -y -q --no-install-recommends"
    log=$(mktemp)
    # shellcheck disable=SC2086 # a list of words
    if $install $packages >"$log" 2>&1 || { apt-get update -q >>"$log" 2>&1 && $install $packages >>"$log" 2>&1; }; then
        rm -f "$log"
        exit 0
    fi
    tail -n 20 "$log" >&2
    rm -f "$log"
fi
echo "Not installed, and not installable from here:$programs (Debian packages:$packages)." >&2
echo "The tests that need them will be skipped, each with its reason." >&2
exit 0
