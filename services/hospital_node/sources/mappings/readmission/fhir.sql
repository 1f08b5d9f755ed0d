-- FHIR R4 to the relations that encounters.sql reads. Copy, change and name it in data.sql if your profiles differ.
-- Tables: fhir_patient, fhir_encounter, fhir_diagnosis (Encounter.diagnosis), fhir_condition, fhir_medication_request,
-- fhir_observation, fhir_procedure (empty where there is none); and extract(until, has_procedures). Their columns:
-- docs/data-sources.md. Statuses that say "this did not happen" are left out below.

CREATE VIEW patients AS
SELECT
  id AS patient,
  CASE gender WHEN 'male' THEN 'Male' WHEN 'female' THEN 'Female' END AS sex,
  -- A missing month or day is the middle of the year or the first of the month.
  CAST(
    CASE length(birth_date) WHEN 4 THEN birth_date || '-07-01' WHEN 7 THEN birth_date || '-01' ELSE birth_date END AS DATE
  ) AS birth_date,
  -- US Core: OMB categories.
  CASE
    WHEN ethnicity = '2135-2' THEN 'Hispanic'
    WHEN race = '2106-3' THEN 'Caucasian'
    WHEN race = '2054-5' THEN 'AfricanAmerican'
    WHEN race = '2028-9' THEN 'Asian'
    WHEN race IN ('2076-8', '1002-5', '2131-1') THEN 'Other'
  END AS race,
  CAST(left(deceased_date, 10) AS DATE) AS death_date,
  -- FHIR does not say how long a patient was observed: until the last day that the export knows of. A day that is still to
  -- come is a mistyped year.
  (
    SELECT max(day) FROM (SELECT CAST(left(coalesce(end_time, start_time), 10) AS DATE) AS day FROM fhir_encounter), extract
    WHERE day <= coalesce(until, day)
  ) AS followed_until
FROM fhir_patient;

CREATE VIEW visits AS
SELECT
  id AS visit,
  patient,
  CASE
    WHEN class IN ('IMP', 'ACUTE', 'NONAC') THEN 'inpatient'
    WHEN class = 'EMER' THEN 'emergency'
    WHEN class IN ('AMB', 'VR', 'HH', 'FLD') THEN 'outpatient'
  END AS kind,
  CAST(left(start_time, 10) AS DATE) AS start_date,
  -- A stay that has not ended can be a readmission, but not an index stay.
  CASE WHEN status = 'finished' THEN CAST(left(end_time, 10) AS DATE) END AS end_date,
  CASE priority WHEN 'EM' THEN '1' WHEN 'UR' THEN '2' WHEN 'EL' THEN '3' END AS admission_type,
  CASE admit_source
    WHEN 'emd' THEN '7' WHEN 'hosp-trans' THEN '4' WHEN 'nursing' THEN '5' WHEN 'psych' THEN '6' WHEN 'rehab' THEN '6'
    WHEN 'gp' THEN '1' WHEN 'mp' THEN '1' WHEN 'outp' THEN '2'
  END AS admission_source,
  CASE
    WHEN discharge IS NULL THEN '1'
    -- UB-04 patient discharge status, as US Core has it.
    WHEN regexp_matches(discharge, '^[0-9]+$') THEN CASE CAST(discharge AS INTEGER)
      WHEN 1 THEN '1' WHEN 2 THEN '2' WHEN 3 THEN '3' WHEN 4 THEN '4' WHEN 5 THEN '5' WHEN 6 THEN '6' WHEN 7 THEN '7'
      WHEN 8 THEN '8' WHEN 9 THEN '9' WHEN 20 THEN '11' WHEN 30 THEN '12' WHEN 40 THEN '19' WHEN 41 THEN '20' WHEN 42 THEN '21'
      WHEN 50 THEN '13' WHEN 51 THEN '14' WHEN 61 THEN '15' WHEN 62 THEN '22' WHEN 63 THEN '23' WHEN 65 THEN '28'
      WHEN 43 THEN '27' WHEN 64 THEN '24' WHEN 66 THEN '29' WHEN 70 THEN '30'
      -- The same with a planned readmission.
      WHEN 81 THEN '1' WHEN 82 THEN '2' WHEN 83 THEN '3' WHEN 84 THEN '4' WHEN 85 THEN '5' WHEN 86 THEN '6'
      WHEN 88 THEN '27' WHEN 89 THEN '15' WHEN 90 THEN '22' WHEN 91 THEN '23' WHEN 92 THEN '24' WHEN 93 THEN '28'
      WHEN 94 THEN '29' WHEN 95 THEN '30'
      ELSE '18' END
    -- http://terminology.hl7.org/CodeSystem/discharge-disposition
    ELSE CASE discharge
      WHEN 'home' THEN '1' WHEN 'alt-home' THEN '1' WHEN 'other-hcf' THEN '2' WHEN 'snf' THEN '3' WHEN 'exp' THEN '11'
      WHEN 'hosp' THEN '14' WHEN 'rehab' THEN '22' WHEN 'long' THEN '23' WHEN 'psy' THEN '28' WHEN 'aadvice' THEN '7'
      ELSE '18' END
  END AS discharge
FROM fhir_encounter
WHERE patient IS NOT NULL
  AND coalesce(status, '') NOT IN ('planned', 'cancelled', 'entered-in-error', 'arrived', 'triaged');

-- What Encounter.diagnosis refers to, in its rank; and conditions that name the encounter without being referred to.
CREATE VIEW diagnoses AS
SELECT visit, code, system, min(rank) AS rank, min(position) AS position
FROM (
  SELECT d.encounter AS visit, c.id, c.code, c.system, coalesce(d.rank, 1000) AS rank, c.position
  FROM fhir_diagnosis d JOIN fhir_condition c ON c.id = d.condition
  WHERE coalesce(c.verification, '') NOT IN ('entered-in-error', 'refuted')
  UNION ALL
  SELECT encounter, id, code, system, 1000, position
  FROM fhir_condition
  WHERE encounter IS NOT NULL AND coalesce(verification, '') NOT IN ('entered-in-error', 'refuted')
)
GROUP BY visit, id, code, system;

CREATE VIEW medications AS
SELECT encounter AS visit, lower(name) AS name, coalesce(code, name) AS code, position, dose
FROM fhir_medication_request
WHERE encounter IS NOT NULL
  AND coalesce(status, '') NOT IN ('cancelled', 'entered-in-error', 'draft')
  AND coalesce(intent, '') NOT IN ('proposal', 'plan', 'option');

CREATE VIEW labs AS
SELECT encounter AS visit, loinc, value, unit
FROM fhir_observation
WHERE encounter IS NOT NULL AND laboratory AND coalesce(status, '') NOT IN ('cancelled', 'entered-in-error');

CREATE VIEW procedures AS
SELECT encounter AS visit
FROM fhir_procedure
WHERE encounter IS NOT NULL AND coalesce(status, '') NOT IN ('not-done', 'entered-in-error', 'preparation');
