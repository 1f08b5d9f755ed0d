-- From patients, visits, diagnoses, medications, labs and procedures to one row for each index stay, in the columns and
-- the vocabulary of plans/schemas/readmission.yaml. Definitions and their reasons: docs/data-sources.md.

CREATE VIEW known_visits AS
SELECT v.visit, v.patient, v.kind, v.start_date, v.admission_type, v.admission_source, v.discharge,
  -- An end after `until` is not known yet.
  CASE WHEN v.end_date <= coalesce(x.until, v.end_date) THEN v.end_date END AS end_date
FROM visits v, extract x
WHERE v.start_date IS NOT NULL AND v.start_date <= coalesce(x.until, v.start_date)
  -- What ended before it began was at neither time.
  AND coalesce(v.end_date >= v.start_date, true);

-- A stay: inpatient visits of a patient of which the next begins no later than the day on which the ones before ended.
-- Such a transfer within the hospital is no readmission.
CREATE TABLE stay_visits AS
SELECT *, sum(begins) OVER (PARTITION BY patient ORDER BY start_date, coalesce(end_date, DATE '9999-12-31'), visit) AS stay_number
FROM (
  SELECT *,
    CASE WHEN start_date <= max(coalesce(end_date, DATE '9999-12-31')) OVER (
      PARTITION BY patient ORDER BY start_date, coalesce(end_date, DATE '9999-12-31'), visit
      ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ) THEN 0 ELSE 1 END AS begins
  FROM known_visits WHERE kind = 'inpatient'
);

CREATE TABLE stays AS
SELECT
  patient,
  stay_number,
  min_by(visit, (start_date, visit)) AS stay,
  min(start_date) AS start_date,
  CASE WHEN bool_and(end_date IS NOT NULL) THEN max(end_date) END AS end_date,
  min_by(coalesce(admission_type, ''), (start_date, visit)) AS admission_type,
  min_by(coalesce(admission_source, ''), (start_date, visit)) AS admission_source,
  max_by(discharge, (coalesce(end_date, DATE '9999-12-31'), start_date, visit)) AS discharge
FROM stay_visits
GROUP BY patient, stay_number;

-- Index stays with their outcome. `died_after`: days from discharge to death; `gap`: days to the next stay.
CREATE TABLE index_stays AS
SELECT s.*, p.sex, p.birth_date, p.race,
  date_diff('day', s.end_date, lead(s.start_date) OVER (PARTITION BY s.patient ORDER BY s.stay_number)) AS gap,
  date_diff('day', s.end_date, p.death_date) AS died_after,
  date_diff('day', s.end_date, least(p.followed_until, coalesce((SELECT until FROM extract), p.followed_until))) AS followed
FROM stays s
LEFT JOIN (
  SELECT * REPLACE (CASE WHEN death_date <= coalesce((SELECT until FROM extract), death_date) THEN death_date END AS death_date)
  FROM patients
) p USING (patient);

CREATE VIEW stay_diagnoses AS
SELECT i.stay, d.code, d.system, d.rank, d.position, v.start_date
FROM index_stays i
JOIN stay_visits v USING (patient, stay_number)
JOIN diagnoses d ON d.visit = v.visit
WHERE d.code IS NOT NULL AND trim(d.code) <> '';

-- The schema groups ICD-9 codes. ICD-10 categories become one ICD-9 code of the group that they belong to.
CREATE TABLE icd10_groups (first VARCHAR, last VARCHAR, icd9 VARCHAR);
INSERT INTO icd10_groups VALUES
  ('A00', 'B99', '136'), ('C00', 'D49', '199'), ('D50', 'D89', '285'), ('E00', 'E07', '246'), ('E15', 'E89', '277'),
  ('F01', 'F99', '300'), ('G00', 'G99', '349'), ('H00', 'H95', '379'), ('I00', 'I19', '401'), ('I20', 'I25', '414'),
  ('I26', 'I49', '427'), ('I50', 'I50', '428'), ('I51', 'I99', '459'), ('J00', 'J99', '519'), ('K00', 'K95', '569'),
  ('L00', 'L99', '709'), ('M00', 'M99', '729'), ('N00', 'N08', '583'), ('N10', 'N16', '590'), ('N17', 'N19', '586'),
  ('N20', 'N24', '599'), ('N25', 'N29', '588'), ('N30', 'N99', '599'), ('O00', 'O99', '669'), ('P00', 'P96', '779'),
  ('Q00', 'Q99', '759'), ('R00', 'R03', '785'), ('R04', 'R07', '786'), ('R09', 'R09', '786'), ('R11', 'R19', '787'),
  ('R30', 'R39', '788'), ('R57', 'R59', '785'), ('S00', 'T88', '959'), ('Z50', 'Z50', 'V57');

CREATE TABLE coded_diagnoses AS
SELECT d.stay, d.rank, d.start_date, d.position,
  CASE
    WHEN d.system = 'ICD-9' AND regexp_matches(d.plain, '^[0-9]{3}') THEN
      CASE WHEN length(d.plain) > 3 THEN left(d.plain, 3) || '.' || substr(d.plain, 4) ELSE d.plain END
    WHEN d.system = 'ICD-9' THEN left(d.plain, 3)
    -- E08 to E13: diabetes; the fourth character 9 is "without complications".
    WHEN d.system = 'ICD-10' AND left(d.plain, 3) BETWEEN 'E08' AND 'E14' THEN
      CASE WHEN substr(d.plain, 4, 1) IN ('', '9') THEN '250' ELSE '250.9' END
    WHEN d.system = 'ICD-10' THEN coalesce(g.icd9, d.plain)
    ELSE d.code
  END AS code
FROM (SELECT *, replace(upper(trim(code)), '.', '') AS plain FROM stay_diagnoses) d
LEFT JOIN icd10_groups g ON d.system = 'ICD-10' AND left(d.plain, 3) BETWEEN g.first AND g.last;

-- The first place of each code, numbered in the order primary, day, entry.
CREATE TABLE ranked_diagnoses AS
SELECT stay, code, row_number() OVER (PARTITION BY stay ORDER BY place, code) AS number
FROM (SELECT stay, code, min((rank, start_date, position)) AS place FROM coded_diagnoses GROUP BY stay, code);

CREATE TABLE stay_diagnosis_columns AS
SELECT stay, count(*) AS number_diagnoses,
  max(code) FILTER (number = 1) AS diag_1, max(code) FILTER (number = 2) AS diag_2, max(code) FILTER (number = 3) AS diag_3
FROM ranked_diagnoses GROUP BY stay;

CREATE TABLE stay_medications AS
SELECT i.stay, coalesce(m.name, '') AS name, m.code, m.dose, (v.start_date, m.position) AS place
FROM index_stays i
JOIN stay_visits v USING (patient, stay_number)
JOIN medications m ON m.visit = v.visit;

-- Which schema column a name belongs to. A combination counts for each of its parts; `diabetes` stands for all others.
CREATE TABLE ingredients (ingredient VARCHAR, pattern VARCHAR);
INSERT INTO ingredients VALUES
  ('insulin', 'insulin'), ('metformin', 'metformin'), ('repaglinide', 'repaglinide'), ('nateglinide', 'nateglinide'),
  ('glimepiride', 'glimepiride'), ('glipizide', 'glipizide'), ('glyburide', 'glyburide|glibenclamide'),
  ('pioglitazone', 'pioglitazone'), ('rosiglitazone', 'rosiglitazone'), ('acarbose', 'acarbose'),
  ('diabetes', 'chlorpropamide|tolbutamide|tolazamide|acetohexamide|gliclazide|miglitol|troglitazone|gliptin|gliflozin|glutide|exenatide|lixisenatide|tirzepatide|pramlintide');

-- Up or down: the last order's daily amount against the first one's, within the stay.
CREATE TABLE stay_ingredients AS
SELECT stay, ingredient,
  CASE
    WHEN last_dose > first_dose THEN 'Up'
    WHEN last_dose < first_dose THEN 'Down'
    ELSE 'Steady'
  END AS course
FROM (
  SELECT m.stay, g.ingredient,
    min_by(m.dose, m.place) FILTER (isfinite(m.dose)) AS first_dose,
    max_by(m.dose, m.place) FILTER (isfinite(m.dose)) AS last_dose
  FROM stay_medications m JOIN ingredients g ON regexp_matches(m.name, g.pattern)
  GROUP BY m.stay, g.ingredient
);

CREATE TABLE stay_medication_columns AS
SELECT i.stay,
  (SELECT count(DISTINCT m.code) FROM stay_medications m WHERE m.stay = i.stay) AS num_medications,
  max(g.course) FILTER (g.ingredient = 'insulin') AS insulin,
  max(g.course) FILTER (g.ingredient = 'metformin') AS metformin,
  max(g.course) FILTER (g.ingredient = 'repaglinide') AS repaglinide,
  max(g.course) FILTER (g.ingredient = 'nateglinide') AS nateglinide,
  max(g.course) FILTER (g.ingredient = 'glimepiride') AS glimepiride,
  max(g.course) FILTER (g.ingredient = 'glipizide') AS glipizide,
  max(g.course) FILTER (g.ingredient = 'glyburide') AS glyburide,
  max(g.course) FILTER (g.ingredient = 'pioglitazone') AS pioglitazone,
  max(g.course) FILTER (g.ingredient = 'rosiglitazone') AS rosiglitazone,
  max(g.course) FILTER (g.ingredient = 'acarbose') AS acarbose,
  coalesce(bool_or(g.course IN ('Up', 'Down')), false) AS changed,
  count(g.ingredient) > 0 AS taken
FROM index_stays i LEFT JOIN stay_ingredients g USING (stay)
GROUP BY i.stay;

-- HbA1c in percent (NGSP), glucose in mg/dL; a value in another unit, or in none, is not used, nor one that is not finite: NaN
-- is above every number here. The highest counts.
CREATE TABLE stay_lab_columns AS
SELECT stay, count(*) AS num_lab_procedures,
  max(CASE unit WHEN '%' THEN value WHEN 'mmol/mol' THEN 0.09148 * value + 2.152 END)
    FILTER (isfinite(value) AND loinc IN ('4548-4', '17856-6', '59261-8')) AS a1c,
  max(CASE unit WHEN 'mg/dL' THEN value WHEN 'mmol/L' THEN 18.016 * value END)
    FILTER (isfinite(value) AND loinc IN ('2345-7', '2339-0', '14749-6')) AS glucose
FROM (
  SELECT i.stay, l.*
  FROM index_stays i JOIN stay_visits v USING (patient, stay_number) JOIN labs l ON l.visit = v.visit
)
GROUP BY stay;

CREATE TABLE stay_procedure_columns AS
SELECT i.stay, count(*) AS num_procedures
FROM index_stays i JOIN stay_visits v USING (patient, stay_number) JOIN procedures p ON p.visit = v.visit
GROUP BY i.stay;

-- Visits in the 365 days before admission.
CREATE TABLE earlier AS
SELECT i.stay,
  count(*) FILTER (v.kind = 'emergency') AS number_emergency,
  count(*) FILTER (v.kind = 'outpatient') AS number_outpatient
FROM index_stays i
JOIN known_visits v ON v.patient = i.patient AND v.start_date >= i.start_date - 365 AND v.start_date < i.start_date
GROUP BY i.stay;

CREATE TABLE earlier_stays AS
SELECT i.stay, count(*) AS number_inpatient
FROM index_stays i
JOIN stays s ON s.patient = i.patient AND s.start_date >= i.start_date - 365 AND s.start_date < i.start_date
GROUP BY i.stay;

CREATE VIEW encounters AS
SELECT
  i.patient AS patient_nbr,
  i.stay AS encounter_id,
  CASE WHEN i.gap <= 30 THEN '<30' WHEN i.gap IS NOT NULL THEN '>30' ELSE 'NO' END AS readmitted,
  -- Dead on the day of discharge or before: died in hospital, whatever the visit says.
  CASE WHEN i.died_after <= 0 THEN '11' ELSE i.discharge END AS discharge_disposition_id,
  coalesce(es.number_inpatient, 0) AS number_inpatient,
  coalesce(e.number_emergency, 0) AS number_emergency,
  coalesce(e.number_outpatient, 0) AS number_outpatient,
  coalesce(d.number_diagnoses, 0) AS number_diagnoses,
  greatest(1, date_diff('day', i.start_date, i.end_date)) AS time_in_hospital,
  m.num_medications,
  coalesce(l.num_lab_procedures, 0) AS num_lab_procedures,
  -- Not known is not none: without the table the cell is missing.
  CASE WHEN (SELECT has_procedures FROM extract) THEN coalesce(r.num_procedures, 0) END AS num_procedures,
  CASE WHEN i.birth_date <= i.start_date THEN
    '[' || 10 * least(9, date_sub('year', i.birth_date, i.start_date) // 10) || '-'
    || 10 * (least(9, date_sub('year', i.birth_date, i.start_date) // 10) + 1) || ')'
  END AS age,
  CASE WHEN m.changed THEN 'Ch' ELSE 'No' END AS change,
  CASE WHEN m.taken THEN 'Yes' ELSE 'No' END AS "diabetesMed",
  i.sex AS gender,
  i.race AS race,
  i.admission_type AS admission_type_id,
  i.admission_source AS admission_source_id,
  -- Neither is in the tables that are read; a mapping of your own can fill them in.
  CAST(NULL AS VARCHAR) AS payer_code,
  CAST(NULL AS VARCHAR) AS medical_specialty,
  d.diag_1, d.diag_2, d.diag_3,
  CASE WHEN l.glucose > 300 THEN '>300' WHEN l.glucose > 200 THEN '>200' WHEN l.glucose IS NOT NULL THEN 'Norm' END AS max_glu_serum,
  CASE WHEN l.a1c > 8 THEN '>8' WHEN l.a1c > 7 THEN '>7' WHEN l.a1c IS NOT NULL THEN 'Norm' END AS "A1Cresult",
  coalesce(m.insulin, 'No') AS insulin,
  coalesce(m.metformin, 'No') AS metformin,
  coalesce(m.repaglinide, 'No') AS repaglinide,
  coalesce(m.nateglinide, 'No') AS nateglinide,
  coalesce(m.glimepiride, 'No') AS glimepiride,
  coalesce(m.glipizide, 'No') AS glipizide,
  coalesce(m.glyburide, 'No') AS glyburide,
  coalesce(m.pioglitazone, 'No') AS pioglitazone,
  coalesce(m.rosiglitazone, 'No') AS rosiglitazone,
  coalesce(m.acarbose, 'No') AS acarbose
FROM index_stays i
LEFT JOIN stay_diagnosis_columns d USING (stay)
LEFT JOIN stay_medication_columns m USING (stay)
LEFT JOIN stay_lab_columns l USING (stay)
LEFT JOIN stay_procedure_columns r USING (stay)
LEFT JOIN earlier e USING (stay)
LEFT JOIN earlier_stays es USING (stay)
-- Ended, and with a known outcome: readmitted, dead, or followed for 30 days.
WHERE i.end_date IS NOT NULL AND (i.gap IS NOT NULL OR i.died_after <= 30 OR i.followed >= 30);
