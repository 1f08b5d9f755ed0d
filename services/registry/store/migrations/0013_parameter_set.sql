-- oldest-release: 0013
-- An older one would open attempts under keys with which hospitals cannot encrypt.
--
-- The parameter set of the secure sum that a plan names. Key epochs get a public key once an approved plan needs one.
--
-- The release before may run meanwhile, which knows only one set: its plans, and those from before, are of that one.

set role registry_owner;

-- A lock that is not free at once would hold up everybody behind it: fail instead, and be run again.
set local lock_timeout = '5s';

alter table registry.plans add column parameter_set text not null default 'bfv-n4096-q60-t48-v2'
    check (parameter_set ~ '^[a-z0-9-]{1,32}$');

reset role;
