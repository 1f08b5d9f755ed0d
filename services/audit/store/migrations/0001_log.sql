-- oldest-release: 0001
--
-- The append-only log. Everything belongs to audit_owner, who cannot sign in. The service signs in as audit_service,
-- which may select and insert and nothing else; triggers refuse changes to everybody, the owner included.

grant usage on schema audit to audit_service;
grant select on audit._yoyo_migration to audit_service;

set local role audit_owner;

-- One row for each event. leaf: the exact bytes that were hashed (canonical JSON). leaf_hash: SHA-256(0x00 || leaf).
create table audit.entries (
    index bigint primary key check (index >= 0),
    event_id uuid not null unique,
    leaf bytea not null,
    leaf_hash bytea not null check (leaf_hash = sha256('\x00'::bytea || leaf)),
    recorded_at timestamptz not null
);

-- Hashes of complete subtrees (RFC 9162, 2.1): the one at (level, position) covers the entries from
-- position * 2^level up to, and without, (position + 1) * 2^level. Level 0 is audit.entries.leaf_hash.
create table audit.nodes (
    level smallint not null check (level between 1 and 62),
    position bigint not null check (position >= 0),
    hash bytea not null check (octet_length(hash) = 32),
    primary key (level, position)
);

-- Every checkpoint that was signed for somebody to see; the newest is the head of the log.
create table audit.checkpoints (
    size bigint primary key check (size > 0),
    root bytea not null check (octet_length(root) = 32),
    note text not null,
    recorded_at timestamptz not null
);

create function audit.refuse_change() returns trigger language plpgsql as $body$
begin
    raise exception 'audit.% is append-only: % refused', tg_table_name, tg_op using errcode = 'insufficient_privilege';
end
$body$;

create trigger append_only before update or delete or truncate on audit.entries
    for each statement execute function audit.refuse_change();
create trigger append_only before update or delete or truncate on audit.nodes
    for each statement execute function audit.refuse_change();
create trigger append_only before update or delete or truncate on audit.checkpoints
    for each statement execute function audit.refuse_change();

-- Also in sessions that play back replication.
alter table audit.entries enable always trigger append_only;
alter table audit.nodes enable always trigger append_only;
alter table audit.checkpoints enable always trigger append_only;

grant select, insert on audit.entries, audit.nodes, audit.checkpoints to audit_service;
