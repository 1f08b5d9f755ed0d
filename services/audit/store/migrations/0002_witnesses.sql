-- oldest-release: 0001
--
-- What witnesses say of the log: cosignatures of checkpoints, and alarms. Insert-only, like the log itself.

set local role audit_owner;

-- One cosignature of a hospital for a checkpoint. public_key: the key that it named; readers compare it with their
-- roster. line: the C2SP signature line, newline included. cosigned_at: by the witness's clock.
create table audit.cosignatures (
    size bigint not null check (size > 0),
    hospital_id text not null check (hospital_id ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    public_key bytea not null check (octet_length(public_key) = 32),
    line text not null check (length(line) <= 1000),
    cosigned_at timestamptz not null,
    recorded_at timestamptz not null,
    primary key (size, hospital_id)
);

-- What a witness refused, with both checkpoints. alarm_id: SHA-256 over who, what and both checkpoints.
create table audit.alarms (
    alarm_id bytea primary key check (octet_length(alarm_id) = 32),
    hospital_id text not null,
    kind text not null check (kind in ('fork', 'rollback', 'bad_checkpoint', 'unprovable')),
    held_checkpoint text not null,
    seen_checkpoint text not null,
    reason text not null,
    recorded_at timestamptz not null
);
create index alarms_newest on audit.alarms (recorded_at);
create index alarms_of_hospital on audit.alarms (hospital_id);

create trigger append_only before update or delete or truncate on audit.cosignatures
    for each statement execute function audit.refuse_change();
create trigger append_only before update or delete or truncate on audit.alarms
    for each statement execute function audit.refuse_change();
alter table audit.cosignatures enable always trigger append_only;
alter table audit.alarms enable always trigger append_only;

grant select, insert on audit.cosignatures, audit.alarms to audit_service;

reset role;
