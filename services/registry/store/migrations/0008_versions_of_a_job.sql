-- oldest-release: 0007
--
-- A page of a job's versions, newest first, without a look at the versions of other jobs.
--
-- The release before may run meanwhile: this adds an index alone.

set role registry_owner;

-- A lock that is not free at once would hold up everybody behind it: fail instead, and be run again.
set local lock_timeout = '5s';

create index rounds_by_job on registry.rounds (job_id, seq desc);

reset role;
