-- OMOP CDM v5.4 to the relations that encounters.sql reads. Copy, change and name it in data.sql if your ETL differs.
-- Tables: person, visit_occurrence, condition_occurrence, drug_exposure, measurement, observation_period, death, concept
-- (those that the other tables name), procedure_occurrence (empty where there is none); and extract(until,
-- has_procedures). Concept ids are of the OHDSI vocabularies.

CREATE VIEW patients AS
SELECT
  CAST(p.person_id AS VARCHAR) AS patient,
  CASE p.gender_concept_id WHEN 8507 THEN 'Male' WHEN 8532 THEN 'Female' END AS sex,
  -- A missing month or day is the middle of the year or the first of the month.
  make_date(p.year_of_birth, coalesce(p.month_of_birth, 7), coalesce(p.day_of_birth, 1)) AS birth_date,
  CASE
    WHEN p.ethnicity_concept_id = 38003563 THEN 'Hispanic'
    WHEN p.race_concept_id = 8527 THEN 'Caucasian'
    WHEN p.race_concept_id = 8516 THEN 'AfricanAmerican'
    WHEN p.race_concept_id = 8515 THEN 'Asian'
    WHEN p.race_concept_id IN (8557, 8657) THEN 'Other'
  END AS race,
  (SELECT min(d.death_date) FROM death d WHERE d.person_id = p.person_id) AS death_date,
  (SELECT max(o.observation_period_end_date) FROM observation_period o WHERE o.person_id = p.person_id) AS followed_until
FROM person p;

CREATE VIEW visits AS
SELECT
  CAST(visit_occurrence_id AS VARCHAR) AS visit,
  CAST(person_id AS VARCHAR) AS patient,
  CASE
    -- Intensive care (32037, 581379) may be a visit of its own: part of the stay, or going back to the ward would look like a
    -- readmission.
    WHEN visit_concept_id IN (9201, 262, 8717, 32037, 581379) THEN 'inpatient'
    WHEN visit_concept_id IN (9203, 8870) THEN 'emergency'
    -- Outpatient, office, outpatient hospital, at home, by telephone or video.
    WHEN visit_concept_id IN (9202, 581477, 8756, 581476, 5083) THEN 'outpatient'
  END AS kind,
  visit_start_date AS start_date,
  -- 32220, still patient: the CDM dates the end of a visit that goes on with the day of the extract.
  CASE WHEN coalesce(visit_type_concept_id, 0) <> 32220 THEN visit_end_date END AS end_date,
  -- 262: an emergency room visit that became an inpatient stay. Urgent and elective are not told apart in the CDM.
  CASE WHEN visit_concept_id = 262 THEN '1' END AS admission_type,
  CASE
    WHEN visit_concept_id = 262 OR admitted_from_concept_id IN (8870, 9203) THEN '7'
    WHEN admitted_from_concept_id IN (8717, 9201) THEN '4'
    WHEN admitted_from_concept_id IN (8863, 8676) THEN '5'
    WHEN admitted_from_concept_id IN (8920, 8970, 8971) THEN '6'
    WHEN admitted_from_concept_id IN (8940, 581477) THEN '1'
    WHEN admitted_from_concept_id IN (9202, 8756) THEN '2'
  END AS admission_source,
  CASE
    -- No concept: the CDM's convention for "home, or not known".
    WHEN coalesce(discharged_to_concept_id, 0) IN (0, 8536, 581476) THEN '1'
    WHEN discharged_to_concept_id IN (8717, 9201) THEN '2'
    WHEN discharged_to_concept_id = 8863 THEN '3'
    WHEN discharged_to_concept_id = 8676 THEN '4'
    WHEN discharged_to_concept_id = 38004519 THEN '6'
    WHEN discharged_to_concept_id = 4216643 THEN '11'
    WHEN discharged_to_concept_id = 8546 THEN '14'
    WHEN discharged_to_concept_id = 8920 THEN '22'
    WHEN discharged_to_concept_id = 8970 THEN '23'
    WHEN discharged_to_concept_id = 8971 THEN '28'
    ELSE '18'
  END AS discharge
FROM visit_occurrence;

CREATE VIEW diagnoses AS
SELECT
  CAST(c.visit_occurrence_id AS VARCHAR) AS visit,
  coalesce(s.concept_code, c.condition_source_value) AS code,
  CASE
    WHEN s.vocabulary_id IN ('ICD9CM') THEN 'ICD-9'
    WHEN s.vocabulary_id IN ('ICD10', 'ICD10CM', 'ICD10GM') THEN 'ICD-10'
    -- A source value without a concept: ICD-9 begins with a digit, with V and two digits, with E9, or with E8 if a dot comes
    -- after three digits. E1165, without its dot, is ICD-10's diabetes and no external cause.
    WHEN s.concept_id IS NULL AND regexp_matches(
      c.condition_source_value, '^(V?[0-9]{2,3}(\.?[0-9]*)|E8[0-9]{2}\.[0-9]|E9[0-9]{2}(\.?[0-9])?)$'
    ) THEN 'ICD-9'
    WHEN s.concept_id IS NULL AND regexp_matches(c.condition_source_value, '^[A-Z][0-9][0-9A-Z]') THEN 'ICD-10'
  END AS system,
  -- Primary diagnosis, primary admission, primary discharge.
  CASE WHEN c.condition_status_concept_id IN (32902, 32901, 32903) THEN 1 ELSE 2 END AS rank,
  c.condition_occurrence_id AS position
FROM condition_occurrence c
LEFT JOIN concept s ON s.concept_id = c.condition_source_concept_id AND s.concept_id <> 0
WHERE c.visit_occurrence_id IS NOT NULL;

CREATE VIEW medications AS
SELECT
  CAST(d.visit_occurrence_id AS VARCHAR) AS visit,
  lower(coalesce(c.concept_name, d.drug_source_value)) AS name,
  coalesce(c.concept_code, d.drug_source_value) AS code,
  d.drug_exposure_id AS position,
  -- Units a day. The CDM has no dose of its own.
  d.quantity / greatest(coalesce(d.days_supply, 1), 1) AS dose
FROM drug_exposure d
LEFT JOIN concept c ON c.concept_id = d.drug_concept_id AND c.concept_id <> 0
WHERE d.visit_occurrence_id IS NOT NULL;

CREATE VIEW labs AS
SELECT
  CAST(m.visit_occurrence_id AS VARCHAR) AS visit,
  c.concept_code AS loinc,
  m.value_as_number AS value,
  u.concept_code AS unit
FROM measurement m
JOIN concept c ON c.concept_id = m.measurement_concept_id AND c.vocabulary_id = 'LOINC' AND c.concept_class_id = 'Lab Test'
LEFT JOIN concept u ON u.concept_id = m.unit_concept_id AND u.vocabulary_id = 'UCUM'
WHERE m.visit_occurrence_id IS NOT NULL;

CREATE VIEW procedures AS
SELECT CAST(visit_occurrence_id AS VARCHAR) AS visit FROM procedure_occurrence WHERE visit_occurrence_id IS NOT NULL;
