-- oldest-release: 0006
-- An older one would let in certificates that were revoked.
--
-- How hospitals get their certificates: invitations, what was issued, and from when on certificates count.
--
-- The release before may run meanwhile: new columns are nullable, nothing of it is changed.

set role registry_owner;

set local lock_timeout = '5s';

-- Certificates of this hospital that begin before this moment are revoked.
alter table registry.hospitals add column certificates_from timestamptz;
-- When its standing changed last: a key epoch from before is to be followed by another.
alter table registry.hospitals add column standing_at timestamptz;

-- Every certificate that was issued; `csr_sha256` finds it again for a request that is repeated.
create table registry.certificates (
    hospital_id registry.hospital_name not null references registry.hospitals,
    serial text not null check (serial ~ '^[0-9a-f]{1,40}$'),
    csr_sha256 registry.sha256_hex not null,
    -- Of the public key (SubjectPublicKeyInfo): no key is certified twice, whoever asks.
    key_sha256 registry.sha256_hex not null unique,
    pem text not null check (octet_length(pem) <= 65536),
    not_before timestamptz not null,
    not_after timestamptz not null check (not_after > not_before),
    issued_at timestamptz not null,
    primary key (hospital_id, serial)
);
-- Each begins later than the one before, so that `certificates_from` tells them apart.
create unique index certificates_by_beginning on registry.certificates (hospital_id, not_before desc);

-- One-time tokens: their digests only. An open invitation has neither `used_at` nor `withdrawn_at`.
create table registry.invitations (
    token_sha256 registry.sha256_hex primary key,
    hospital_id registry.hospital_name not null references registry.hospitals,
    issued_by text not null,
    issued_at timestamptz not null,
    expires_at timestamptz not null check (expires_at > issued_at),
    withdrawn_at timestamptz,
    used_at timestamptz,
    serial text,
    foreign key (hospital_id, serial) references registry.certificates (hospital_id, serial),
    check ((used_at is null) = (serial is null)),
    check (used_at is null or withdrawn_at is null)
);
create unique index invitations_open on registry.invitations (hospital_id) where used_at is null and withdrawn_at is null;

do $$
declare
    consortium constant text := '(select current_setting(''app.scope'', true) = ''consortium'')';
    hospital constant text := '(select nullif(current_setting(''app.hospital_id'', true), ''''))';
    rules constant text[] := array[
        ['certificates', 'hospital_id = ' || hospital],
        ['invitations', 'false']
    ];
    rule text[];
begin
    foreach rule slice 1 in array rules loop
        execute format('alter table registry.%I enable row level security', rule[1]);
        execute format('alter table registry.%I force row level security', rule[1]);
        execute format('create policy visible on registry.%I for select using (%s or %s)', rule[1], consortium, rule[2]);
        execute format('create policy consortium_writes on registry.%I for insert with check (%s)', rule[1], consortium);
    end loop;
    execute format('create policy consortium_changes on registry.invitations for update using (%s)', consortium);
end
$$;

-- Least privilege: what was issued is inserted and read; an invitation is used or withdrawn; nothing is deleted.
grant select, insert on registry.certificates, registry.invitations to registry_service;
grant update (withdrawn_at, used_at, serial) on registry.invitations to registry_service;
grant update (certificates_from, standing_at) on registry.hospitals to registry_service;

reset role;
