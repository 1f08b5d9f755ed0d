-- oldest-release: 0013
--
-- A round says by itself who may see it, who contributed to it and how large its state is, so that reading model
-- versions asks no other table for each of them.
--
-- The release before may run meanwhile: triggers fill the columns, whoever writes. It waits while the rounds that there
-- are get them, some ten seconds for a hundred thousand.

set role registry_owner;

-- A lock that is not free at once would hold up everybody behind it: fail instead, and be run again.
set local lock_timeout = '5s';

-- hospital_ids: the job's cohort, which never changes. contributed: hospital, digest and age of each contribution, by
-- hospital. state_bytes: empty as long as there is no state.
alter table registry.rounds
    add column hospital_ids text[] not null default '{}',
    add column contributed text[],
    add column state_bytes bigint;

create function registry.complete_round() returns trigger language plpgsql as $$
begin
    new.hospital_ids := coalesce((select j.hospital_ids from registry.jobs j where j.job_id = new.job_id), '{}');
    new.state_bytes := (select b.size_bytes from registry.blobs b where b.sha256 = new.state_sha256);
    return new;
end
$$;
create trigger complete before insert on registry.rounds for each row execute function registry.complete_round();

-- The service may change no round; this runs with the rights of the owner, who sees them as the consortium, whoever
-- contributes. Nobody can call it but a trigger.
create function registry.note_contributions() returns trigger language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    scope constant text := current_setting('app.scope', true);
begin
    perform set_config('app.scope', 'consortium', true);
    update registry.rounds r
       set contributed = (
               select array_agg(array[c.hospital_id::text, c.ciphertext_sha256::text, c.age::text] order by c.hospital_id)
                 from registry.contributions c where c.job_id = r.job_id and c.version = r.version)
      from (select distinct job_id, version from added) a
     where r.job_id = a.job_id and r.version = a.version;
    perform set_config('app.scope', coalesce(scope, ''), true);
    return null;
end
$$;
revoke execute on function registry.note_contributions() from public;
create trigger noted after insert on registry.contributions referencing new table as added
    for each statement execute function registry.note_contributions();

set local app.scope = 'consortium';
update registry.rounds r
   set hospital_ids = j.hospital_ids,
       state_bytes = (select b.size_bytes from registry.blobs b where b.sha256 = r.state_sha256),
       contributed = (
           select array_agg(array[c.hospital_id::text, c.ciphertext_sha256::text, c.age::text] order by c.hospital_id)
             from registry.contributions c where c.job_id = r.job_id and c.version = r.version)
  from registry.jobs j where j.job_id = r.job_id;

do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
    hospital constant text := '(select nullif(current_setting(''app.hospital_id'', true), ''''))';
    name text;
begin
    -- As before, in other words: `job_hospitals` has the same hospitals, but asking it costs a look for each row.
    foreach name in array array['jobs', 'rounds'] loop
        execute format('alter policy visible on registry.%I using (%s or %s = any (hospital_ids))', name, consortium, hospital);
    end loop;
end
$$;

reset role;
