-- Generated rows: %(versions)s model versions in jobs of 100, and %(metrics)s measurements in 12 months. Run by the superuser;
-- foreign keys and triggers rest, because the rows satisfy them. Each job is of 4 of 15 hospitals.
set local session_replication_role = replica;
set local maintenance_work_mem = '512MB';
set local work_mem = '256MB';

insert into registry.hospitals (hospital_id, display_name, status, created_at)
select format('hospital-%%s', lpad(h::text, 2, '0')), 'generated', 'active', now() from generate_series(1, 15) h;

insert into registry.plans (plan_id, name, manifest, rounds, private, status, proposed_by, approved_by, created_at)
values (repeat('0', 64), 'generated', '{}', 100, false, 'approved', 'a', 'b', now());

-- Job n ran in one of the last 12 months, the present one included.
create temporary table job on commit drop as
select n, gen_random_uuid() as job_id, encode(sha256(n::text::bytea), 'hex') as state,
       (select array_agg(format('hospital-%%s', lpad((1 + (n + 4 * k) %% 15)::text, 2, '0'))) from generate_series(0, 3) k) as members,
       now() - make_interval(months => (n %% 12)::integer) as at
  from generate_series(1, (%(versions)s + 99) / 100) n;

insert into registry.jobs (job_id, plan_id, hospital_ids, status, version, created_at, ended_at)
select job_id, repeat('0', 64), members, 'completed', least(100, %(versions)s - 100 * (n - 1)), at, at from job order by n;
insert into registry.job_hospitals (hospital_id, job_id) select unnest(members), job_id from job;
insert into registry.blobs (sha256, size_bytes, created_at) select state, 1, at from job;
insert into registry.job_blobs (job_id, sha256, hospital_id, created_at) select job_id, state, members[1], at from job;

create temporary table version on commit drop as
select job.*, v as version from job, generate_series(1, 100) v where 100 * (n - 1) + v <= %(versions)s;

insert into registry.attempts (job_id, round, attempt, reason, opened_at) select job_id, version, 1, '', at from version;
insert into registry.rounds (job_id, version, attempt, sum_sha256, state_sha256, contributions_root, agreeing, dissenting,
       attesting, finalizer, metrics_json, upload_bytes, sealed_at, committed_at, content_sha256, hospital_ids,
       contributed, state_bytes)
select job_id, version, 1, state, state, state, members, '{}', members, members[1], '{"validation_auroc":0.64}', 33000, at,
       at, sha256(''), members, (select array_agg(array[h, state, '0'] order by h) from unnest(members) h), 1
  from version order by n, version;
insert into registry.contributions (hospital_id, job_id, version, ciphertext_sha256)
select unnest(members), job_id, version, state from version;

-- Of each version as many names as it takes, of the joint model and of its four hospitals. Each month by itself, its index
-- when it is full: that is what makes tens of millions of rows in minutes. Unlogged: what is measured are reads.
do $$
declare
    names constant integer := greatest(1, ((%(metrics)s + 5 * %(versions)s - 1) / (5 * %(versions)s))::integer);
    left_over bigint := %(metrics)s;
    made bigint;
    part text;
    month timestamptz;
begin
    for ago in 0..11 loop
        month := date_trunc('month', now() - make_interval(months => ago), 'UTC');
        part := 'measurements_' || to_char(month at time zone 'UTC', 'YYYY_MM');
        execute format('drop table if exists registry.%%I', part);
        execute format('create unlogged table registry.%%I (like registry.measurements including defaults including constraints)', part);
        execute format(
            'insert into registry.%%I (recorded_at, job_id, value, version, hospital_id, name)'
            ' select at, job_id, random(), version, hospital, ''number_'' || m'
            ' from version, unnest(array_prepend('''', members)) hospital, generate_series(1, $1) m where n %%%% 12 = $2 limit $3', part)
            using names, ago, left_over;
        get diagnostics made = row_count;
        left_over := left_over - made;
        execute format('alter table registry.%%I add primary key (hospital_id, job_id, name, version, recorded_at)', part);
        execute format('alter table registry.measurements attach partition registry.%%I for values from (%%L) to (%%L)',
            part, month, month + interval '1 month');
    end loop;
end
$$;

insert into registry.measurements_by_day
select date_trunc('day', recorded_at, 'UTC'), job_id, count(*), min(value), max(value), sum(value), min(version), max(version),
       hospital_id, name
  from registry.measurements group by 1, job_id, hospital_id, name;
