"""The starter project that ``featserve init`` writes: small, commented, and ready to be applied, loaded and asked.

Comes in: a folder and the instant of its making. The sample rows are dated back from that instant, so that nothing in
them has expired on the day they are first asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from featserve.errors import CallerError

SETTINGS = """\
# The settings of this project. Every key has a default: this file may be empty. Paths are relative to this folder.

[project]
# Python files (or globs) whose module-level variables are the project's definitions.
definitions = ["features.py"]

[registry]
# What was applied: each name@version, with its history. A team shares one in PostgreSQL:
# url = "postgresql://USER:PASSWORD@HOST:5432/DATABASE"   (or the environment variable FEATSERVE_REGISTRY_URL)
url = "sqlite:///.featserve/registry.db"

[store]
# The online store: the newest row of each entity, embedded in the server's process.
path = ".featserve/store"
# What an acknowledged write survives: the death of the "process", or that of the machine ("fsync", slower).
durability = "process"

[server]
host = "127.0.0.1"
port = 7070
# workers = 0                    # processes that serve; 0: one for each core
# transport = "native"         # pygrpc-native instead of "grpcio": faster, for callers that are trusted
# max_rows = 10000               # in one request
# max_concurrent = 512           # requests at once; more are refused at once
# max_streams = 16               # of these on one connection, with "native"; a client with more holds them back
# max_message_mb = 16
# default_deadline_ms = 5000     # for a request that carries no deadline
# drain_seconds = 10             # how long requests in flight may take after SIGTERM
# registry_poll_seconds = 2      # how soon what is applied is served, without a restart
# Without these two nothing is encrypted, and whoever reaches the port reads and writes: stay on loopback or a private
# network. With the third, clients show a certificate, too. Renewed files are taken without a restart.
# tls_certificate = "tls/server.pem"
# tls_key = "tls/server.key"
# tls_client_ca = "tls/clients.pem"

[telemetry]
# prometheus_port = 9464         # metrics, at http://HOST:9464/metrics
# otlp_endpoint = "http://localhost:4317"   # traces: where OpenTelemetry's collector takes them
# sample_ratio = 0.01            # the part of requests that is traced, where the caller has not decided
"""

FEATURES = '''\
"""The features of a small web shop: what featserve serves, and a training set is made of.

Change something here, then look at what that means with `featserve plan` and make it so with `featserve apply`.
"""

from datetime import timedelta

from featserve import CsvSource, Entity, FeatureService, FeatureView, Field, Float32, Int32, Int64, String

# What the features are about, and the key that names one of it. Several keys make a composite one.
customer = Entity("customer", {"customer_id": Int64}, description="Somebody with an account")

# A view is a set of features that become true together. This one holds what changes seldom; it has no ttl, so the
# newest row of a customer is served however old it is.
profile = FeatureView(
    "profile",
    customer,
    [
        Field("country", String, description="ISO 3166 code of the delivery address", not_null=True),
        Field("plan", String, default="free", allowed=["free", "plus"], description="What the customer pays for"),
    ],
    # Every source says when a row became true: that is what makes training data honest.
    source=CsvSource("data/profiles.csv", event_time="changed_at"),
    owner="growth",
    description="What customers told us",
)

# A count over the day that ended at event_time. The job that computes it takes two hours, and no model may know the
# number before that: `delay` says so, online and in training data alike. After 90 days a row is too old to be served.
orders = FeatureView(
    "orders",
    customer,
    [
        Field("orders_30d", Int32, min=0, description="Orders in the last 30 days"),
        Field("spent_30d", Float32, min=0, description="Euros in the last 30 days"),
        Field("days_since_last", Float32, description="Null for a customer who never ordered"),
    ],
    ttl=timedelta(days=90),
    source=CsvSource("data/orders.csv", event_time="day_end", delay=timedelta(hours=2)),
    owner="growth",
    description="What customers bought",
)

# What one model asks for: features in order, served as one vector of float32, with what is not a float beside it.
churn = FeatureService(
    "churn",
    [orders, profile["country", "plan"]],
    owner="growth",
    description="Will the customer be back within 30 days?",
)
'''

IGNORED = """\
# `featserve apply` and `featserve materialize` make the registry and the store here: no part of version control.
*
"""

CUSTOMERS = range(1001, 1021)
COUNTRIES = ("DE", "FR", "NZ", "PT")


def profiles(now: datetime) -> str:
    """Return rows of customers' profiles: two for those who changed their plan, none for the last customer."""
    rows = ["customer_id,changed_at,country,plan"]
    chance = random.Random(1)
    for customer in CUSTOMERS[:-1]:
        joined = now - timedelta(days=chance.randint(40, 700), minutes=chance.randint(0, 1_439))
        country = chance.choice(COUNTRIES)
        rows.append(f"{customer},{_iso(joined)},{country},{'' if chance.random() < 0.2 else 'free'}")
        if chance.random() < 0.4:
            rows.append(f"{customer},{_iso(joined + timedelta(days=chance.randint(1, 39)))},{country},plus")
    return _text(rows)


def order_counts(now: datetime) -> str:
    """Return a row for each customer and each of the last seven days that ended two hours before ``now``."""
    rows = ["customer_id,day_end,orders_30d,spent_30d,days_since_last"]
    chance = random.Random(2)
    last = (now - timedelta(hours=2)).replace(hour=0, minute=0, second=0, microsecond=0)
    for customer in CUSTOMERS:
        orders = chance.randint(0, 3)
        spent, since = orders * chance.uniform(9, 60), chance.randint(1, 20)
        for ago in range(6, -1, -1):
            since += 1
            if chance.random() < 0.15:
                orders, spent, since = orders + 1, spent + chance.uniform(9, 60), 0
            day_end = _iso(last - timedelta(days=ago))
            rows.append(f"{customer},{day_end},{orders},{spent:.2f},{since if orders else ''}")
    return _text(rows)


FILES: dict[str, Callable[[datetime], str]] = {
    "featserve.toml": lambda now: SETTINGS,
    "features.py": lambda now: FEATURES,
    "data/profiles.csv": profiles,
    "data/orders.csv": order_counts,
    ".featserve/.gitignore": lambda now: IGNORED,
}

TOLD = {
    "featserve.toml": "settings: where the registry, the store and the server are",
    "features.py": "definitions: an entity, two feature views, a feature service",
    "data/": "sample rows, dated back from today",
}

NEXT = (
    ("featserve plan", "what would be applied"),
    ("featserve apply", "publish the definitions"),
    ("featserve materialize", "load the sample rows"),
    ("featserve get churn customer_id=1001,1002", "ask in this process"),
    ("featserve serve", "serve; in another terminal:"),
    ("featserve get churn customer_id=1001,1002 --server 127.0.0.1:7070", ""),
)
"""Commands that work in the starter project, in this order, each with what it does."""


def write_starter(folder: Path, now: datetime) -> None:
    """Write the starter project into ``folder``.

    Raises CallerError where that would overwrite a file, having written nothing.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        raise CallerError(
            f"{folder} already has {', '.join(there)}; nothing was written. Name a new folder: `featserve init FOLDER`"
        )
    try:
        for name, text in FILES.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(now), encoding="utf-8")
    except OSError as error:
        raise CallerError(f"cannot write the project: {error}") from None


def _iso(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(rows: list[str]) -> str:
    return "\n".join(rows) + "\n"
