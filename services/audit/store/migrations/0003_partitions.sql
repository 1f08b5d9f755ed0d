-- oldest-release: 0003
-- An older one cannot append.
--
-- The entries in partitions, each a complete subtree of the Merkle tree once it is full, so that it can be checked by
-- itself and kept as files (ADR 42). What the service may do stays: select and insert.

set local role audit_owner;

-- How the log is partitioned, and when a partition may go. level: a partition has 2^level entries; for good, because
-- those that are there do not change. months_online: so long entries stay here before they may be in archives alone.
create table audit.partitioning (
    single boolean primary key default true check (single),
    level smallint not null check (level between 1 and 62),
    months_online smallint not null check (months_online >= 0)
);
insert into audit.partitioning (level, months_online) values (22, 24);

-- The partitions that there ever were, archived ones included: table audit.entries_<first_index>, with the entries of
-- the subtree at (level, first_index >> level).
create table audit.partitions (
    first_index bigint primary key check (first_index >= 0),
    level smallint not null check (level between 1 and 62),
    stop_index bigint not null generated always as (first_index + (1::bigint << level)) stored,
    check (first_index & ((1::bigint << level) - 1) = 0)
);

-- The partitions that are in archives alone. root: of their subtree. manifest: the archive's manifest.json, byte for
-- byte, which has the SHA-256 of its other files. event_id: of the event by which the log tells of it.
create table audit.archives (
    first_index bigint primary key,
    root bytea not null check (octet_length(root) = 32),
    manifest text not null,
    detached_by text not null,
    event_id uuid not null unique,
    recorded_at timestamptz not null
);

-- Which event is which entry, over all partitions, archived ones included: an event is in the log once.
create table audit.events (
    event_id uuid primary key,
    index bigint not null check (index >= 0)
);

alter table audit.entries rename to entries_0;
alter index audit.entries_pkey rename to entries_0_pkey;
insert into audit.events (event_id, index) select event_id, index from audit.entries_0 order by index;
-- With it goes its unique constraint. A service of the release before that still runs cannot append any more: its
-- events, which would be missing there, wait for the new one.
alter table audit.entries_0 drop column event_id;

create table audit.entries (
    like audit.entries_0 including constraints,
    primary key (index)
) partition by range (index);

-- The table that was there is the first partition as it is, without a row of it being written again: a subtree of
-- the usual size, or of the smallest power of two that holds all there is.
do $$
declare
    wanted constant smallint := level from audit.partitioning;
    entries constant bigint := coalesce(max(index) + 1, 0) from audit.entries_0;
    chosen smallint := wanted;
begin
    while (1::bigint << chosen) < entries loop
        chosen := chosen + 1;
    end loop;
    insert into audit.partitions (first_index, level) values (0, chosen);
    execute format('alter table audit.entries attach partition audit.entries_0 for values from (0) to (%s)',
        1::bigint << chosen);
end
$$;

-- Partitions until there is one whole one beyond a tree of this size. The service calls it in the transaction that
-- appends, early; a lock that is held elsewhere then only puts it off, at once. Attaching needs no lock that stops
-- readers or writers. It runs with its owner's rights: the service may make what is next, and nothing else.
create function audit.make_partitions(size bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '500ms' as $$
declare
    wide constant smallint := level from audit.partitioning;
    head constant bigint := coalesce(max(c.size), 0) from audit.checkpoints c;
    low bigint := max(stop_index) from audit.partitions;
begin
    if size - head not between 0 and 1000000 then
        raise exception 'a tree of % entries is not the next one after %', size, head using errcode = 'data_exception';
    end if;
    while low - (1::bigint << wide) < size loop
        begin
            if low >= size then
                lock table audit.entries in share update exclusive mode nowait;
            end if;
            execute format('create table audit.entries_%s (like audit.entries including constraints,'
                ' primary key (index))', low);
            execute format('create trigger append_only before update or delete or truncate on audit.entries_%s'
                ' for each statement execute function audit.refuse_change()', low);
            execute format('alter table audit.entries_%s enable always trigger append_only', low);
            execute format('alter table audit.entries attach partition audit.entries_%s for values from (%s) to (%s)',
                low, low, low + (1::bigint << wide));
            insert into audit.partitions (first_index, level) values (low, wide);
        exception when lock_not_available then
            if low < size then
                raise;
            end if;
            raise log 'audit.entries_% is made later', low;
            return;
        end;
        low := low + (1::bigint << wide);
    end loop;
end
$$;

-- Take the next partition out of the database, whose archive somebody has verified against `root`. For the owner
-- alone. The hashes of its leaves stay, as level 0 of audit.nodes, and so do the ids of its events: every proof that
-- was possible before is possible afterwards.
create function audit.detach_partition(first bigint, root bytea, manifest text)
returns void language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '2s' as $$
declare
    part audit.partitions;
    rule audit.partitioning;
    newest timestamptz;
begin
    lock table audit.archives in share row exclusive mode;
    select * into part from audit.partitions p
     where not exists (select from audit.archives a where a.first_index = p.first_index) order by p.first_index limit 1;
    select * into rule from audit.partitioning;
    if part.first_index is distinct from first then
        raise exception 'the partition that may go next begins at entry %, not at %', part.first_index, first
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    if part.stop_index > (select coalesce(max(size), 0) from audit.checkpoints) then
        raise exception 'entries % to % are not all there yet', first, part.stop_index - 1
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    if root is distinct from
        (select hash from audit.nodes n where n.level = part.level and n.position = first >> part.level) then
        raise exception 'entries % to % have another root', first, part.stop_index - 1 using errcode = 'data_exception';
    end if;
    execute format('select max(recorded_at) from audit.entries_%s', first) into newest;
    if newest > clock_timestamp() - make_interval(months => rule.months_online) then
        raise exception 'entries % to % stay in the database for % months: the newest of them is of %',
            first, part.stop_index - 1, rule.months_online, newest using errcode = 'object_not_in_prerequisite_state';
    end if;
    execute format('insert into audit.nodes (level, position, hash) select 0, index, leaf_hash from audit.entries_%s'
        ' order by index', first);
    insert into audit.archives values (first, root, manifest, session_user, gen_random_uuid(), clock_timestamp());
    execute format('alter table audit.entries detach partition audit.entries_%s', first);
    execute format('drop table audit.entries_%s', first);
end
$$;

-- Level 0: leaf hashes of archived entries.
alter table audit.nodes drop constraint nodes_level_check;
alter table audit.nodes add constraint nodes_level_check check (level between 0 and 62);

-- The owner may choose months_online; what happened does not change.
do $$
declare
    name text;
begin
    foreach name in array array['entries', 'events', 'partitions', 'archives'] loop
        execute format('create trigger append_only before update or delete or truncate on audit.%I'
            ' for each statement execute function audit.refuse_change()', name);
        execute format('alter table audit.%I enable always trigger append_only', name);
    end loop;
end
$$;

revoke execute on function audit.detach_partition, audit.make_partitions from public;
grant execute on function audit.make_partitions to audit_service;
grant select, insert on audit.entries, audit.events to audit_service;
grant select on audit.partitioning, audit.partitions, audit.archives to audit_service;
revoke all on audit.entries_0 from audit_service;

do $$
begin
    perform audit.make_partitions(coalesce(max(size), 0)) from audit.checkpoints;
end
$$;

reset role;
