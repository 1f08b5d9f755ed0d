-- oldest-release: 0003
--
-- What hospitals report of their own privacy ledgers: the registry's ledger. A hospital's own is authoritative; this
-- one is what operators see, and what tells a hospital that its own was put back to an older state.
--
-- The release before may run meanwhile: nothing of it is changed.

set role registry_owner;

set local lock_timeout = '5s';

-- One chain for each hospital: an entry commits to all before it. Columns beside `body` repeat what it says.
create table registry.ledger_entries (
    hospital_id registry.hospital_name not null references registry.hospitals,
    seq bigint not null check (seq >= 1),
    kind text not null check (kind in ('reserved', 'charged', 'released')),
    -- A job that the hospital's ledger names; not a reference, because the ledger is the hospital's word.
    job_id text not null check (char_length(job_id) <= 200),
    round integer,
    attempt integer,
    body bytea not null check (octet_length(body) between 2 and 4096),
    sha256 registry.sha256_hex not null,
    -- Over the last entry of each report, by the hospital's signing key in the roster.
    signature bytea check (octet_length(signature) = 64),
    reported_at timestamptz not null,
    primary key (hospital_id, seq),
    check ((kind = 'charged') = (round is not null and attempt is not null))
);
create index ledger_charges on registry.ledger_entries (hospital_id, job_id, round, attempt) where kind = 'charged';

do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
    own constant text := 'hospital_id = (select nullif(current_setting(''app.hospital_id'', true), ''''))';
begin
    alter table registry.ledger_entries enable row level security;
    alter table registry.ledger_entries force row level security;
    execute format('create policy visible on registry.ledger_entries for select using (%s or %s)', consortium, own);
    -- Only the hospital itself: not even the consortium writes into a hospital's ledger.
    execute format('create policy hospital_writes on registry.ledger_entries for insert with check (%s)', own);
end
$$;

-- History is inserted and read; nothing is changed or deleted.
grant select, insert on registry.ledger_entries to registry_service;

reset role;
