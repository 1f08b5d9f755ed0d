-- oldest-release: 0001
--
-- What the consortium agreed and what it made. Everything belongs to registry_owner, who cannot sign in; the service
-- signs in as registry_service, which owns nothing and cannot bypass row-level security.
--
-- Rows that concern hospitals are visible only inside a transaction that says for whom it runs:
--   app.hospital_id = '<hospital>'   sees the jobs that this hospital takes part in, and what belongs to them;
--   app.scope = 'consortium'         sees everything (operators and the consortium's own services).
-- Without either setting there are no rows.

set role registry_owner;

create domain registry.hospital_name as text check (value ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$');
create domain registry.sha256_hex as text check (value ~ '^[0-9a-f]{64}$');

-- Answers of mutations by the client's request id: a repeated request gets the same answer.
create table registry.requests (
    request_id uuid primary key,
    caller text not null,
    method text not null,
    content_sha256 bytea not null check (octet_length(content_sha256) = 32),
    answer bytea not null,
    created_at timestamptz not null
);

create table registry.hospitals (
    hospital_id registry.hospital_name primary key,
    display_name text not null check (char_length(display_name) <= 200),
    status text not null check (status in ('active', 'suspended', 'removed')),
    created_at timestamptz not null
);

create table registry.plans (
    plan_id registry.sha256_hex primary key,
    seq bigint generated always as identity unique,
    name text not null,
    manifest bytea not null check (octet_length(manifest) <= 1048576),
    rounds integer not null check (rounds between 1 and 10000),
    private boolean not null,
    status text not null check (status in ('proposed', 'approved')),
    proposed_by text not null,
    approved_by text check (approved_by <> proposed_by),
    created_at timestamptz not null,
    check ((status = 'approved') = (approved_by is not null))
);

create table registry.jobs (
    job_id uuid primary key,
    seq bigint generated always as identity unique,
    plan_id registry.sha256_hex not null references registry.plans,
    hospital_ids text[] not null check (cardinality(hospital_ids) between 2 and 16),
    status text not null check (status in ('running', 'completed', 'failed', 'cancelled')),
    reason text not null default '' check (char_length(reason) <= 500),
    version integer not null default 0 check (version >= 0),
    created_at timestamptz not null,
    ended_at timestamptz,
    check ((status = 'running') = (ended_at is null))
);
create index jobs_by_status on registry.jobs (status, seq desc);

-- Who takes part in what: the table that all other policies ask.
create table registry.job_hospitals (
    hospital_id registry.hospital_name not null references registry.hospitals,
    job_id uuid not null references registry.jobs,
    primary key (hospital_id, job_id)
);
create index job_hospitals_by_job on registry.job_hospitals (job_id);

create table registry.attempts (
    job_id uuid not null references registry.jobs,
    round integer not null check (round >= 1),
    attempt integer not null check (attempt >= 1),
    reason text not null check (char_length(reason) <= 500),
    opened_at timestamptz not null,
    primary key (job_id, round, attempt)
);

-- Content-addressed storage. A blob is never changed; job_blobs says which jobs may use it.
create table registry.blobs (
    sha256 registry.sha256_hex primary key,
    size_bytes bigint not null check (size_bytes between 1 and 1073741824),
    created_at timestamptz not null
);
create table registry.blob_chunks (
    sha256 registry.sha256_hex not null references registry.blobs,
    position integer not null check (position >= 0),
    content bytea not null check (octet_length(content) between 1 and 1048576),
    primary key (sha256, position)
);
-- Model states do not compress; storing them plainly saves the attempt.
alter table registry.blob_chunks alter column content set storage external;
create table registry.job_blobs (
    job_id uuid not null references registry.jobs,
    -- Checked at commit, because a policy on blobs asks this table first.
    sha256 registry.sha256_hex not null references registry.blobs deferrable initially deferred,
    hospital_id registry.hospital_name not null references registry.hospitals,
    created_at timestamptz not null,
    primary key (job_id, sha256)
);
create index job_blobs_by_blob on registry.job_blobs (sha256);

create table registry.rounds (
    job_id uuid not null references registry.jobs,
    version integer not null check (version >= 1),
    seq bigint generated always as identity unique,
    attempt integer not null,
    sum_sha256 registry.sha256_hex not null,
    state_sha256 registry.sha256_hex not null references registry.blobs,
    contributions_root registry.sha256_hex not null,
    agreeing text[] not null,
    dissenting text[] not null,
    attesting text[] not null,
    finalizer registry.hospital_name not null,
    metrics_json text not null,
    upload_bytes bigint not null check (upload_bytes >= 0),
    sealed_at timestamptz not null,
    committed_at timestamptz not null,
    -- What the coordinator sent, so that the same commit under another request id is recognised.
    content_sha256 bytea not null check (octet_length(content_sha256) = 32),
    primary key (job_id, version),
    foreign key (job_id, version, attempt) references registry.attempts (job_id, round, attempt)
);
create table registry.contributions (
    hospital_id registry.hospital_name not null,
    job_id uuid not null,
    version integer not null,
    ciphertext_sha256 registry.sha256_hex not null,
    primary key (hospital_id, job_id, version),
    foreign key (job_id, version) references registry.rounds (job_id, version),
    foreign key (hospital_id, job_id) references registry.job_hospitals (hospital_id, job_id)
);
create index contributions_by_round on registry.contributions (job_id, version);

-- Numbers over time. Partitioned so that old ranges can be detached; no row-level security, because only operators
-- read it.
create table registry.metrics (
    job_id uuid not null,
    version integer not null,
    name text not null,
    value double precision not null,
    recorded_at timestamptz not null,
    primary key (job_id, name, version, recorded_at)
) partition by range (recorded_at);
create table registry.metrics_default partition of registry.metrics default;

-- Events on their way to the audit log, written in the transaction of the change that they tell of.
create table registry.outbox (
    seq bigint generated always as identity primary key,
    event_id uuid not null unique,
    type text not null,
    occurred_at timestamptz not null,
    actor text not null,
    subject text not null,
    body_json text not null,
    recorded_at timestamptz not null default clock_timestamp(),
    -- A relay holds the event until then; another may take it over afterwards.
    claimed_until timestamptz,
    log_index bigint,
    refusal text
);
create index outbox_waiting on registry.outbox (seq) where log_index is null and refusal is null;
create index outbox_refused on registry.outbox (seq) where refusal is not null;

do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
    hospital constant text := '(select nullif(current_setting(''app.hospital_id'', true), ''''))';
    member constant text := 'exists (select from registry.job_hospitals m where m.job_id = %s.job_id and m.hospital_id = ' || hospital || ')';
    rules constant text[] := array[
        ['requests', 'false'],
        ['hospitals', 'hospital_id = ' || hospital],
        ['jobs', format(member, 'jobs')],
        ['job_hospitals', 'hospital_id = ' || hospital],
        ['attempts', format(member, 'attempts')],
        ['blobs', 'exists (select from registry.job_blobs b where b.sha256 = blobs.sha256)'],
        ['blob_chunks', 'exists (select from registry.job_blobs b where b.sha256 = blob_chunks.sha256)'],
        ['job_blobs', format(member, 'job_blobs')],
        ['rounds', format(member, 'rounds')],
        ['contributions', format(member, 'contributions')]
    ];
    rule text[];
begin
    foreach rule slice 1 in array rules loop
        execute format('alter table registry.%I enable row level security', rule[1]);
        execute format('alter table registry.%I force row level security', rule[1]);
        execute format('create policy visible on registry.%I for select using (%s or %s)', rule[1], consortium, rule[2]);
        execute format('create policy consortium_writes on registry.%I for insert with check (%s)', rule[1], consortium);
        execute format('create policy consortium_changes on registry.%I for update using (%s)', rule[1], consortium);
    end loop;
    -- A hospital stores states of its own jobs under its own name, and nothing else.
    execute format('create policy hospital_writes on registry.job_blobs for insert with check (hospital_id = %s and %s)',
        hospital, format(member, 'job_blobs'));
    create policy hospital_writes on registry.blobs for insert
        with check (exists (select from registry.job_blobs b where b.sha256 = blobs.sha256));
    create policy hospital_writes on registry.blob_chunks for insert
        with check (exists (select from registry.job_blobs b where b.sha256 = blob_chunks.sha256));
    -- Whoever changes something leaves an event; only the relay, which runs for the consortium, reads them.
    alter table registry.outbox enable row level security;
    alter table registry.outbox force row level security;
    execute format('create policy visible on registry.outbox for select using (%s)', consortium);
    execute format('create policy consortium_changes on registry.outbox for update using (%s)', consortium);
    execute format('create policy anyone_writes on registry.outbox for insert with check (%s or %s is not null)',
        consortium, hospital);
end
$$;

-- Least privilege: history is inserted and read, only standings and relay marks are updated, nothing is deleted.
grant select, insert on
    registry.requests, registry.hospitals, registry.plans, registry.jobs, registry.job_hospitals, registry.attempts,
    registry.blobs, registry.blob_chunks, registry.job_blobs, registry.rounds, registry.contributions,
    registry.metrics, registry.outbox
    to registry_service;
grant update (status) on registry.hospitals to registry_service;
grant update (status, approved_by) on registry.plans to registry_service;
grant update (status, reason, version, ended_at) on registry.jobs to registry_service;
grant update (claimed_until, log_index, refusal) on registry.outbox to registry_service;

reset role;

-- The service reads which migrations were applied, and refuses to run on a schema that it does not know.
grant select on registry._yoyo_migration to registry_service;
