-- oldest-release: 0009
-- An older one would commit asynchronous rounds with ages of 0, and log that for good.
--
-- How many versions older than the newest what a hospital contributed was trained on: asynchronous rounds.
--
-- The release before may run meanwhile, which knows only synchronous rounds: there every age is 0.

set role registry_owner;

-- A lock that is not free at once would hold up everybody behind it: fail instead, and be run again.
set local lock_timeout = '5s';

alter table registry.contributions add column age integer not null default 0 check (age >= 0);

reset role;
