-- oldest-release: 0002
--
-- Which event told the audit log of a round, so that a hospital can find its entry there and take a receipt.
--
-- The release before may run meanwhile: the column is nullable. Rounds from before have none, and no receipt.

set role registry_owner;

-- A lock that is not free at once would hold up everybody behind it: fail instead, and be run again.
set local lock_timeout = '5s';

alter table registry.rounds add column event_id uuid;

reset role;
