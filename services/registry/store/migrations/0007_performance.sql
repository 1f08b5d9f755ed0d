-- oldest-release: 0006
--
-- Numbers over time, of each version, of the joint model and of each hospital in a round. `measurements` replaces
-- `metrics`, whose name becomes a view.
--
-- In a database with the extension `timescaledb` it is a hypertable with a continuous aggregate and policies; elsewhere
-- it has native range partitions, a table that a trigger keeps, and a function that the registry calls now and then.
-- Nothing outside this file asks which: both have the same views.
--
-- TimescaleDB refuses row-level security on what it aggregates, and an aggregate shows all of its rows to whoever may
-- read it. So the service may read none of these tables: only views with a security barrier, which show what the
-- policies of the other tables would.
--
-- The release before may run meanwhile: it goes on reading and writing `registry.metrics`.

set role registry_owner;

-- A lock that is not free at once would hold up everybody behind it: fail instead, and be run again.
set local lock_timeout = '5s';

-- How many months of partitions there are ahead, and how many full months of measurements are kept besides the present
-- one. Only the owner may change it: the service must not be able to drop what it wants to be rid of.
create table registry.measurement_policy (
    only_row boolean primary key default true check (only_row),
    months_ahead integer not null default 2 check (months_ahead between 1 and 24),
    months_kept integer not null default 24 check (months_kept between 1 and 1200)
);
insert into registry.measurement_policy default values;

create function registry.has_timescale() returns boolean language sql stable set search_path = pg_catalog as $$
    select exists (select from pg_extension where extname = 'timescaledb');
$$;

-- hospital_id: empty for what was measured of the joint model. Days are of UTC.
do $$
declare
    measurements constant text := '
        create table registry.measurements (
            recorded_at timestamptz not null,
            job_id uuid not null,
            value double precision not null,
            version integer not null,
            hospital_id text not null default '''' check (hospital_id = '''' or hospital_id ~ ''^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$''),
            name text not null check (char_length(name) between 1 and 100),
            primary key (hospital_id, job_id, name, version, recorded_at)
        )';
    extension text;
begin
    if not registry.has_timescale() then
        execute measurements || ' partition by range (recorded_at)';
        create table registry.measurements_default partition of registry.measurements default;
        create table registry.measurements_by_day (
            day timestamptz not null,
            job_id uuid not null,
            points bigint not null,
            lowest double precision not null,
            highest double precision not null,
            total double precision not null,
            first_version integer not null,
            last_version integer not null,
            hospital_id text not null,
            name text not null,
            primary key (hospital_id, job_id, name, day)
        );
        return;
    end if;
    select quote_ident(nspname) into extension
      from pg_extension join pg_namespace n on n.oid = extnamespace where extname = 'timescaledb';
    -- TimescaleDB runs policies as the owner of the hypertable, who must be able to sign in; registry_owner is not.
    set local role registry_migrator;
    execute measurements;
    execute format(
        'select %s.create_hypertable(''registry.measurements'', ''recorded_at'', chunk_time_interval => interval ''1 month'')',
        extension);
    execute format(
        'create materialized view registry.measurements_by_day'
        ' with (timescaledb.continuous, timescaledb.materialized_only = false) as'
        ' select %s.time_bucket(interval ''1 day'', recorded_at) as day, job_id, count(*) as points,'
        ' min(value) as lowest, max(value) as highest, sum(value) as total, min(version) as first_version,'
        ' max(version) as last_version, hospital_id, name from registry.measurements'
        ' group by 1, job_id, hospital_id, name with no data', extension);
    execute format(
        'select %s.add_continuous_aggregate_policy(''registry.measurements_by_day'', start_offset => interval ''3 months'','
        ' end_offset => interval ''1 hour'', schedule_interval => interval ''1 hour'')', extension);
    execute format(
        'select %s.add_retention_policy(''registry.measurements'', drop_after => interval ''25 months'')', extension);
    grant select, insert on registry.measurements to registry_owner;
    grant select on registry.measurements_by_day to registry_owner;
    set local role registry_owner;
end
$$;

-- Make the partition of a month, and move there what the default partition holds of it. False when there is one.
create function registry.make_measurements_month(month date) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    part constant text := 'measurements_' || to_char(month, 'YYYY_MM');
    low constant timestamptz := date_trunc('month', month)::timestamp at time zone 'UTC';
    high constant timestamptz := (date_trunc('month', month) + interval '1 month')::timestamp at time zone 'UTC';
begin
    if to_regclass('registry.' || part) is not null then
        return false;
    end if;
    -- First, so that nothing more comes in there meanwhile.
    lock table registry.measurements_default in access exclusive mode;
    execute format('create table registry.%I (like registry.measurements including defaults including constraints)', part);
    execute format(
        'with moved as (delete from registry.measurements_default where recorded_at >= %L and recorded_at < %L returning *)'
        ' insert into registry.%I select * from moved', low, high, part);
    execute format('alter table registry.measurements attach partition registry.%I for values from (%L) to (%L)',
        part, low, high);
    return true;
end
$$;

-- What the registry calls now and then: partitions for the months to come and for what came late, and none for months
-- that are over. It takes no argument: the service cannot choose what is dropped. Sums by day stay.
create function registry.tend_measurements() returns table (made integer, dropped integer)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '1s' as $$
declare
    this_month constant date := date_trunc('month', clock_timestamp() at time zone 'UTC')::date;
    policy registry.measurement_policy;
    oldest date;
    month date;
    part text;
begin
    made := 0;
    dropped := 0;
    -- Its policies do it. Several registries may call at once: one of them is enough.
    if registry.has_timescale() or not pg_try_advisory_xact_lock(x'6d6561737572'::bigint) then
        return next;
        return;
    end if;
    select * into policy from registry.measurement_policy;
    oldest := this_month - make_interval(months => policy.months_kept);
    delete from registry.measurements_default where recorded_at < oldest::timestamp at time zone 'UTC';
    for month in
        select date_trunc('month', m)::date
          from generate_series(this_month::timestamp, this_month + make_interval(months => policy.months_ahead), '1 month') m
         union
        select date_trunc('month', recorded_at at time zone 'UTC')::date from registry.measurements_default
         where recorded_at < this_month::timestamp at time zone 'UTC'
    loop
        begin
            made := made + registry.make_measurements_month(month)::integer;
        exception when lock_not_available or check_violation then
            -- A number of that month is being written, or was since this transaction began.
            raise log 'the partition of measurements of % is made later', month;
        end;
    end loop;
    for part in
        select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
         where i.inhparent = 'registry.measurements'::regclass and c.relname ~ '^measurements_\d{4}_\d{2}$'
           and to_date(right(c.relname, 7), 'YYYY_MM') < oldest
    loop
        begin
            execute format('drop table registry.%I', part);
            dropped := dropped + 1;
        exception when lock_not_available then
            raise log 'registry.% is in use and is dropped later', part;
        end;
    end loop;
    return next;
end
$$;

-- What the release before wrote.
lock table registry.metrics in access exclusive mode;
do $$
begin
    if not registry.has_timescale() then
        perform registry.make_measurements_month(month)
           from (select distinct date_trunc('month', recorded_at at time zone 'UTC')::date as month from registry.metrics) m;
        perform registry.tend_measurements();
    end if;
end
$$;
insert into registry.measurements (recorded_at, job_id, value, version, name)
select recorded_at, job_id, value, version, name from registry.metrics;
drop table registry.metrics;

-- Whoever writes in the name of a hospital writes of that hospital and of a job of its own.
create function registry.require_own_measurement() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    if new.hospital_id = '' or new.hospital_id is distinct from current_setting('app.hospital_id', true)
       or not exists (select from registry.job_hospitals j where j.job_id = new.job_id and j.hospital_id = new.hospital_id)
    then
        raise exception 'a hospital measures for itself only' using errcode = 'insufficient_privilege';
    end if;
    return new;
end
$$;

-- The sums by day, in the transaction that measures.
create function registry.add_to_days() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    insert into registry.measurements_by_day as known
           (day, job_id, points, lowest, highest, total, first_version, last_version, hospital_id, name)
    select date_trunc('day', recorded_at, 'UTC'), job_id, count(*), min(value), max(value), sum(value), min(version),
           max(version), hospital_id, name
      from added group by 1, job_id, hospital_id, name
    on conflict (hospital_id, job_id, name, day) do update
       set points = known.points + excluded.points,
           lowest = least(known.lowest, excluded.lowest),
           highest = greatest(known.highest, excluded.highest),
           total = known.total + excluded.total,
           first_version = least(known.first_version, excluded.first_version),
           last_version = greatest(known.last_version, excluded.last_version);
    return null;
end
$$;

do $$
begin
    if registry.has_timescale() then
        grant execute on function registry.require_own_measurement() to registry_migrator;
        set local role registry_migrator;
    else
        insert into registry.measurements_by_day
        select date_trunc('day', recorded_at, 'UTC'), job_id, count(*), min(value), max(value), sum(value), min(version),
               max(version), hospital_id, name
          from registry.measurements group by 1, job_id, hospital_id, name;
        create trigger days after insert on registry.measurements
            referencing new table as added for each statement execute function registry.add_to_days();
    end if;
    create trigger own before insert on registry.measurements for each row
        when (current_setting('app.scope', true) is distinct from 'consortium')
        execute function registry.require_own_measurement();
    set local role registry_owner;
end
$$;

-- What a hospital sees: its own numbers, and those of the joint model of jobs that it takes part in. Never those of
-- another hospital.
do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
    hospital constant text := '(select nullif(current_setting(''app.hospital_id'', true), ''''))';
    joint constant text := '(m.hospital_id = '''' and exists (select from registry.job_hospitals j where j.job_id = m.job_id and j.hospital_id = ' || hospital || '))';
    visible constant text := format('(%s or m.hospital_id = %s or %s)', consortium, hospital, joint);
begin
    execute 'create view registry.metrics with (security_barrier) as'
        ' select m.job_id, m.version, m.name, m.value, m.recorded_at from registry.measurements m'
        ' where m.hospital_id = '''' and ' || visible;
    execute 'create view registry.performance with (security_barrier) as'
        ' select m.hospital_id, m.job_id, m.version, m.name, m.value, m.recorded_at from registry.measurements m'
        ' where ' || visible;
    execute 'create view registry.performance_by_day with (security_barrier) as'
        ' select m.hospital_id, m.job_id, m.name, (m.day at time zone ''UTC'')::date as day, m.points, m.lowest, m.highest,'
        ' m.total, m.first_version, m.last_version from registry.measurements_by_day m where ' || visible;
end
$$;

grant select, insert on registry.metrics, registry.performance to registry_service;
grant select on registry.performance_by_day to registry_service;
grant execute on function registry.tend_measurements() to registry_service;

reset role;
