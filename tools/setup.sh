#!/bin/sh
# Set-up for the Makefile, on a Debian with python3 and make and nothing else prepared.
#
#   setup.sh venv            .venv with everything from requirements/dev.txt, hashes checked
#   setup.sh packages WHAT   the Debian packages that WHAT (test or bench) talks to
#
# As root it installs missing Debian packages itself; else it says which to install, and stops.
set -eu
cd "$(dirname "$0")/.."

install_packages() {
    [ $# -eq 0 ] && return
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
        echo "These Debian packages are missing. Install them and run this again:" >&2
        echo "    apt-get install $*" >&2
        exit 10
    fi
    echo "Installing $* ..." >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@" > /dev/null
}

case "$1" in
venv)
    missing=""
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; this is $(python3 --version)." >&2
        exit 10
    }
    python3 -c 'import ensurepip, venv' 2> /dev/null || missing="python3-venv"
    install_packages $missing
    rm -f .venv/.installed
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    touch .venv/.installed
    ;;
packages)
    missing=""
    command -v age > /dev/null || missing="$missing age"
    command -v zstd > /dev/null || missing="$missing zstd"
    command -v script > /dev/null || missing="$missing bsdutils"
    command -v mount > /dev/null || missing="$missing mount"
    # What networks of namespaces are made of.
    command -v ip > /dev/null || missing="$missing iproute2"
    command -v nft > /dev/null || missing="$missing nftables"
    command -v ethtool > /dev/null || missing="$missing ethtool"
    command -v socat > /dev/null || missing="$missing socat"
    if [ "$2" = test ]; then
        command -v setfattr > /dev/null || missing="$missing attr"
        command -v strace > /dev/null || missing="$missing strace"
        # What judges the timers and crontab lines that are made.
        command -v systemd-analyze > /dev/null || missing="$missing systemd"
        command -v crontab > /dev/null || missing="$missing cron"
        command -v ping > /dev/null || missing="$missing iputils-ping"
    else
        command -v curl > /dev/null || missing="$missing curl"
        command -v pbzip2 > /dev/null || missing="$missing pbzip2"
        command -v pgbackrest > /dev/null || missing="$missing pgbackrest"
        command -v udp-sender > /dev/null || missing="$missing udpcast"
        command -v uftp > /dev/null || missing="$missing uftp"
        command -v mbuffer > /dev/null || missing="$missing mbuffer"
    fi
    ls /usr/lib/postgresql/*/bin/postgres > /dev/null 2>&1 || missing="$missing postgresql"
    [ -x /usr/sbin/mariadbd ] || missing="$missing mariadb-server-core"
    command -v mariadb-dump > /dev/null || missing="$missing mariadb-client"
    command -v mariadb-backup > /dev/null || missing="$missing mariadb-backup"
    command -v redis-server > /dev/null || missing="$missing redis-server"
    install_packages $missing
    ;;
*)
    echo "usage: setup.sh venv | packages test|bench" >&2
    exit 2
    ;;
esac
