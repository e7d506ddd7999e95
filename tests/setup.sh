#!/usr/bin/env bash
# Install the programs that the tests run beside Python, where they are missing. Does nothing when all are there.
set -euo pipefail

has_postgresql() {
    command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

has_java() {
    local java version
    java="${JAVA_HOME:+$JAVA_HOME/bin/}java"
    # The version line is 'openjdk version "17.0.15" ...'.
    version="$("$java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p')" || return 1
    [[ -n "$version" ]] && ((version >= 17))
}

has_valgrind() {
    command -v valgrind >/dev/null
}

has_h2load() {
    command -v h2load >/dev/null
}

has_redis() {
    command -v redis-server >/dev/null
}

packages=()
need() {
    packages+=("$1")
    echo "tests/setup.sh: $1 is missing: $2"
}
has_postgresql || need postgresql "the registry's tests start a PostgreSQL server of their own"
has_java || need default-jre-headless "the tests of Spark need Java 17 or newer"
has_valgrind || need valgrind "make counts counts instructions with it"
has_h2load || need nghttp2-client "a million requests are sent with its h2load"
has_redis || need redis-server "the comparison with peers asks it for its version"
((${#packages[@]})) || exit 0

give_up() {
    echo "tests/setup.sh: $1" >&2
    echo "tests/setup.sh: install what these Debian packages hold, and try again: ${packages[*]}" >&2
    exit 1
}

command -v apt-get >/dev/null || give_up "cannot install it here: there is no apt-get"
as_root=()
if ((EUID != 0)); then
    command -v sudo >/dev/null || give_up "cannot install it here: it takes root, and there is no sudo"
    as_root=(sudo)
    [[ -t 0 ]] || as_root+=(--non-interactive)
fi
export DEBIAN_FRONTEND=noninteractive
echo "tests/setup.sh: installing ${packages[*]} with apt-get"
"${as_root[@]}" apt-get -qq update || give_up "apt-get update failed"
"${as_root[@]}" apt-get -qq install --yes --no-install-recommends "${packages[@]}" >/dev/null || give_up "apt-get install failed"
has_postgresql || give_up "PostgreSQL's initdb is still not to be found"
has_java || give_up "Java 17 or newer is still not to be found${JAVA_HOME:+ in JAVA_HOME=$JAVA_HOME}"
has_valgrind || give_up "valgrind is still not to be found"
has_h2load || give_up "h2load is still not to be found"
has_redis || give_up "redis-server is still not to be found"
