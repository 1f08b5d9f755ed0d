-- oldest-release: 0004
--
-- What becomes of model versions: attestations, what hospitals found of them, aliases, tags, promotions, roll-backs.
--
-- The release before may run meanwhile: nothing of it is changed. Versions from before have no attestation, and are not
-- promoted.

set role registry_owner;

set local lock_timeout = '5s';

-- The in-toto statement of a version in its signed envelope, made in the transaction that made the version.
create table registry.attestations (
    job_id uuid not null,
    version integer not null,
    envelope bytea not null check (octet_length(envelope) between 2 and 262144),
    sha256 registry.sha256_hex not null,
    event_id uuid not null,
    primary key (job_id, version),
    foreign key (job_id, version) references registry.rounds (job_id, version)
);

-- What a hospital found of a version, in its own words and under its roster key. Its first word stands.
create table registry.check_reports (
    hospital_id registry.hospital_name not null,
    job_id uuid not null,
    version integer not null,
    statement bytea not null check (octet_length(statement) between 2 and 16384),
    signature bytea not null check (octet_length(signature) = 64),
    reported_at timestamptz not null,
    primary key (hospital_id, job_id, version),
    foreign key (job_id, version) references registry.rounds (job_id, version),
    foreign key (hospital_id, job_id) references registry.job_hospitals (hospital_id, job_id)
);
create index check_reports_by_version on registry.check_reports (job_id, version);

-- One person proposes, another approves. The verdicts are envelopes that the registry signed.
create table registry.promotions (
    promotion_id uuid primary key,
    model text not null,
    alias registry.hospital_name not null,
    job_id uuid not null,
    version integer not null,
    proposed_by text not null,
    proposed_at timestamptz not null,
    proposal_verdict bytea not null,
    approved_by text check (approved_by <> proposed_by),
    approved_at timestamptz,
    approval_verdict bytea,
    foreign key (job_id, version) references registry.rounds (job_id, version),
    check ((approved_by is null) = (approved_at is null) and (approved_by is null) = (approval_verdict is null))
);
create index promotions_by_version on registry.promotions (job_id, version);

-- Every move of an alias; it points where its last move says.
create table registry.alias_moves (
    seq bigint generated always as identity primary key,
    model text not null,
    alias registry.hospital_name not null,
    job_id uuid not null,
    version integer not null,
    moved_by text not null,
    moved_at timestamptz not null,
    promotion_id uuid references registry.promotions,
    foreign key (job_id, version) references registry.rounds (job_id, version),
    check (alias <> 'production' or promotion_id is not null)
);
create index alias_moves_newest on registry.alias_moves (model, alias, seq desc);

-- Every change of a tag; an empty value removes it.
create table registry.tag_changes (
    seq bigint generated always as identity primary key,
    job_id uuid not null,
    version integer not null,
    key registry.hospital_name not null,
    value text not null check (char_length(value) <= 200),
    set_by text not null,
    set_at timestamptz not null,
    foreign key (job_id, version) references registry.rounds (job_id, version)
);
create index tag_changes_newest on registry.tag_changes (job_id, version, key, seq desc);

-- A job that was stopped because its model got worse, and the version that is its result.
create table registry.rollbacks (
    job_id uuid primary key references registry.jobs,
    diverged_version integer not null,
    good_version integer not null check (good_version >= 1 and good_version < diverged_version),
    reason text not null check (char_length(reason) <= 500),
    at timestamptz not null,
    foreign key (job_id, diverged_version) references registry.rounds (job_id, version),
    foreign key (job_id, good_version) references registry.rounds (job_id, version)
);

do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
    hospital constant text := '(select nullif(current_setting(''app.hospital_id'', true), ''''))';
    member constant text := 'exists (select from registry.job_hospitals m where m.job_id = %I.job_id and m.hospital_id = ' || hospital || ')';
    guarded text;
begin
    foreach guarded in array
        array['attestations', 'check_reports', 'promotions', 'alias_moves', 'tag_changes', 'rollbacks']
    loop
        execute format('alter table registry.%I enable row level security', guarded);
        execute format('alter table registry.%I force row level security', guarded);
        execute format('create policy visible on registry.%I for select using (%s or %s)',
            guarded, consortium, format(member, guarded));
        if guarded = 'check_reports' then
            -- Only the hospital itself: not even the consortium says for a hospital what it found.
            execute format('create policy hospital_writes on registry.check_reports for insert with check (hospital_id = %s and %s)',
                hospital, format(member, guarded));
        else
            execute format('create policy consortium_writes on registry.%I for insert with check (%s)', guarded, consortium);
        end if;
    end loop;
    execute format(
        'create policy consortium_approves on registry.promotions for update using (%s and approved_by is null)'
        ' with check (%s and approved_by is not null)', consortium, consortium);
end
$$;

-- History is inserted and read; a proposal is approved once; nothing is deleted.
grant select, insert on
    registry.attestations, registry.check_reports, registry.promotions, registry.alias_moves, registry.tag_changes,
    registry.rollbacks
    to registry_service;
grant update (approved_by, approved_at, approval_verdict) on registry.promotions to registry_service;

reset role;
