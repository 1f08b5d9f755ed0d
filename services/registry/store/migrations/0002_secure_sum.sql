-- oldest-release: 0002
-- An older one cannot read a burnt version, and would run a job of a roster as one without.
--
-- What the masked secure sum must not forget: rosters, key epochs, confirmed survivors, strikes, burnt versions.
--
-- The release before may run meanwhile: new columns are nullable or have a default, nothing is renamed or dropped.
-- A job from before has no roster; it can be read and ended, but opens no attempt.

set role registry_owner;

-- A lock that is not free at once would hold up everybody behind it: fail instead, and be run again.
set local lock_timeout = '5s';

-- Who is a member with which keys, as hospitals signed it. One chain: each version names the one before.
create table registry.rosters (
    version integer primary key check (version >= 1),
    sha256 registry.sha256_hex not null unique,
    statement bytea not null check (octet_length(statement) between 1 and 65536),
    members text[] not null check (cardinality(members) between 2 and 64),
    signers text[] not null,
    signatures bytea[] not null,
    published_by text not null,
    published_at timestamptz not null,
    check (cardinality(signers) = cardinality(signatures) and cardinality(signers) >= 1)
);

-- Sealed keys: the first publication of a number stands, because the key is the key.
create table registry.epochs (
    roster_sha256 registry.sha256_hex not null references registry.rosters (sha256),
    epoch integer not null check (epoch >= 1),
    maker registry.hospital_name not null references registry.hospitals,
    statement bytea not null check (octet_length(statement) between 1 and 262144),
    signature bytea not null check (octet_length(signature) = 64),
    published_at timestamptz not null,
    primary key (roster_sha256, epoch)
);
alter table registry.epochs alter column statement set storage external;

alter table registry.jobs add column roster_sha256 registry.sha256_hex references registry.rosters (sha256);
-- The key epoch that an attempt was told to use.
alter table registry.attempts add column epoch integer check (epoch >= 1);
-- Strikes from before do not count: set when somebody reinstates the hospital.
alter table registry.hospitals add column strikes_from timestamptz;

-- Whose uploads count, confirmed by at least t of them before any mask is opened. One list for a round, for ever.
create table registry.survivors (
    job_id uuid not null references registry.jobs,
    round integer not null check (round >= 1),
    attempt integer not null check (attempt >= 1),
    sha256 registry.sha256_hex not null,
    statement bytea not null check (octet_length(statement) between 1 and 65536),
    signers text[] not null,
    signatures bytea[] not null,
    -- The coordinator's own record of the attempt; dropped when the round is committed or the job has ended.
    details bytea check (octet_length(details) <= 4194304),
    stored_at timestamptz not null,
    primary key (job_id, round),
    unique (job_id, round, sha256),
    foreign key (job_id, round, attempt) references registry.attempts (job_id, round, attempt),
    check (cardinality(signers) = cardinality(signatures) and cardinality(signers) >= 2)
);
alter table registry.survivors alter column details set storage external;

-- What no honest node sends. `job_id` to `attempt` are empty when it was sent outside of an attempt.
create table registry.strikes (
    hospital_id registry.hospital_name not null references registry.hospitals,
    request_id uuid not null,
    code text not null check (code ~ '^[a-z][a-z0-9-]{0,62}$'),
    reason text not null check (char_length(reason) <= 500),
    job_id uuid,
    round integer,
    attempt integer,
    reported_by text not null,
    at timestamptz not null,
    primary key (hospital_id, request_id)
);
create index strikes_by_time on registry.strikes (hospital_id, at desc);

-- A burnt version has contributions and survivors, but made no state: `state_sha256` repeats the state before it, if
-- there was one.
alter table registry.rounds
    add column burnt boolean not null default false,
    add column burnt_reason text not null default '' check (char_length(burnt_reason) <= 500),
    add column survivors_sha256 registry.sha256_hex,
    alter column sum_sha256 drop not null,
    alter column state_sha256 drop not null,
    alter column finalizer drop not null,
    add constraint rounds_whole check (
        burnt or (burnt_reason = '' and sum_sha256 is not null and state_sha256 is not null and finalizer is not null)
    ),
    add constraint rounds_burnt check (not burnt or (survivors_sha256 is not null and finalizer is null)),
    add constraint rounds_survivors foreign key (job_id, version, survivors_sha256)
        references registry.survivors (job_id, round, sha256);

do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
    hospital constant text := '(select nullif(current_setting(''app.hospital_id'', true), ''''))';
    own_request constant text := 'caller like ''%/hospital/'' || ' || hospital;
    rules constant text[] := array[
        -- Members check the whole chain of rosters, and keys are sealed to each of them.
        ['rosters', hospital || ' is not null'],
        ['epochs', hospital || ' is not null'],
        ['survivors', 'false'],
        ['strikes', 'hospital_id = ' || hospital]
    ];
    rule text[];
begin
    foreach rule slice 1 in array rules loop
        execute format('alter table registry.%I enable row level security', rule[1]);
        execute format('alter table registry.%I force row level security', rule[1]);
        execute format('create policy visible on registry.%I for select using (%s or %s)', rule[1], consortium, rule[2]);
        execute format('create policy consortium_writes on registry.%I for insert with check (%s)', rule[1], consortium);
    end loop;
    -- Details may go, and never change.
    execute format(
        'create policy consortium_forgets on registry.survivors for update using (%s) with check (details is null)',
        consortium);
    -- A hospital publishes keys that it made itself, and finds the answers to its own requests.
    execute format('create policy hospital_writes on registry.epochs for insert with check (maker = %s)', hospital);
    execute format('create policy hospital_visible on registry.requests for select using (%s)', own_request);
    execute format('create policy hospital_writes on registry.requests for insert with check (%s)', own_request);
end
$$;

-- Least privilege: history is inserted and read; details are forgotten; nothing is deleted.
grant select, insert on registry.rosters, registry.epochs, registry.survivors, registry.strikes to registry_service;
grant update (details) on registry.survivors to registry_service;
grant update (strikes_from) on registry.hospitals to registry_service;

reset role;
