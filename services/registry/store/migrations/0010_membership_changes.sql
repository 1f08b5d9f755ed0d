-- oldest-release: 0009
--
-- Changes of membership that one person proposes and another approves.
--
-- The release before may run meanwhile: nothing of it is changed. Its replicas still let one person do all of it.

set role registry_owner;

set local lock_timeout = '5s';

create table registry.membership_changes (
    change_id uuid primary key,
    kind text not null check (kind in ('invite', 'reinstate', 'remove')),
    hospital_id registry.hospital_name not null references registry.hospitals,
    reason text not null check (char_length(reason) <= 500),
    -- Of an invitation's token, and for how long it may be used from the approval on.
    token_sha256 registry.sha256_hex unique,
    valid_s integer check (valid_s > 0),
    proposed_by text not null,
    proposed_at timestamptz not null,
    expires_at timestamptz not null check (expires_at > proposed_at),
    approved_by text check (approved_by <> proposed_by),
    approved_at timestamptz,
    check ((approved_by is null) = (approved_at is null)),
    check ((kind = 'invite') = (token_sha256 is not null) and (kind = 'invite') = (valid_s is not null))
);
create index membership_changes_by_time on registry.membership_changes (proposed_at desc);

do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
begin
    alter table registry.membership_changes enable row level security;
    alter table registry.membership_changes force row level security;
    execute format('create policy visible on registry.membership_changes for select using (%s)', consortium);
    execute format('create policy consortium_writes on registry.membership_changes for insert with check (%s)', consortium);
    execute format(
        'create policy consortium_approves on registry.membership_changes for update using (%s and approved_by is null)'
        ' with check (%s and approved_by is not null)', consortium, consortium);
end
$$;

-- A proposal is inserted, read, and approved once; nothing is deleted.
grant select, insert on registry.membership_changes to registry_service;
grant update (approved_by, approved_at) on registry.membership_changes to registry_service;

reset role;
