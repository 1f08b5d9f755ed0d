-- oldest-release: 0012
-- An older one would count as left what a lost ledger counts as spent.
--
-- Privacy ledgers that were lost and built again: an entry of another kind, which names no job.
--
-- The release before may run meanwhile: it takes no such entry, and the hospital's recovery waits for this one.

set role registry_owner;

set local lock_timeout = '5s';

alter table registry.ledger_entries
    drop constraint ledger_entries_kind_check,
    add constraint ledger_entries_kind_check check (kind in ('reserved', 'charged', 'released', 'recovered')),
    add constraint ledger_entries_job_check check ((kind = 'recovered') = (job_id = ''));

reset role;
