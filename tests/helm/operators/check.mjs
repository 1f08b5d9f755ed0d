// Validates objects of operators against the models of @kubernetes-models (MIT), which are made from the operators' own Go types.
// Of cert-manager 1.20.2, CloudNativePG 1.29.0, barman-cloud 0.5.0, External Secrets 0.16.2, Gateway API 1.5.1 and Prometheus
// Operator 0.91.0, in the versions that package-lock.json names.
//
// A model lets unknown keys pass, and so does an API server that is not asked to be strict: it drops them without a word.
// Here a model gets its object behind a proxy, and a key that it never read is one that the operator does not know.
//
// Usage: node check.mjs FOLDER < objects.json > errors.json
// FOLDER holds the node_modules of package.json; errors.json has a list of errors for each object.
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const models = join(resolve(process.argv[2]), "node_modules", "@kubernetes-models");
const packages = {
  "cert-manager.io": "cert-manager",
  "external-secrets.io": "external-secrets",
  "gateway.networking.k8s.io": "gateway-api",
  "monitoring.coreos.com": "prometheus-operator",
  "postgresql.cnpg.io": "cloudnative-pg",
};
const barman = "cloudnative-pg/github.com/cloudnative-pg/barman-cloud/pkg/api";

// The value behind proxies. `unread` gets the JSON pointer of every key of it, and loses those that somebody reads.
function watched(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const inner = new Map();
  for (const key of Object.keys(value)) {
    const pointer = `${path}/${key.replaceAll("~", "~0").replaceAll("/", "~1")}`;
    unread.add(pointer);
    inner.set(key, { pointer, value: watched(value[key], pointer, unread) });
  }
  return new Proxy(value, {
    get(target, key) {
      if (!inner.has(key)) return Reflect.get(target, key);
      unread.delete(inner.get(key).pointer);
      return inner.get(key).value;
    },
  });
}

async function errorsOf(file, name, value, path) {
  const model = (await import(pathToFileURL(join(models, file, `${name}.js`))))[name];
  const unread = new Set();
  const found = [];
  try {
    model.prototype.validate.call(watched(value, path, unread));
  } catch (refusal) {
    if (!refusal.errors) throw refusal;
    found.push(...refusal.errors.map((error) => `${path}${error.instancePath} ${error.message}`));
  }
  const topmost = [...unread].filter((pointer) => !unread.has(pointer.slice(0, pointer.lastIndexOf("/"))));
  return [...found, ...topmost.map((pointer) => `${pointer} is unknown`)];
}

// The Barman Cloud plugin's own type is in no package, only that of the configuration in it: the rest is written down here.
async function objectStoreErrors({ spec: { configuration, retentionPolicy, ...others } }) {
  const found = await errorsOf(barman, "BarmanObjectStoreConfiguration", configuration, "/spec/configuration");
  if (!/^[1-9][0-9]*[dwm]$/.test(retentionPolicy)) found.push("/spec/retentionPolicy must be days, weeks or months: 30d");
  return [...found, ...Object.keys(others).map((key) => `/spec/${key} is unknown`)];
}

async function check(object) {
  const { apiVersion, kind } = object;
  if (apiVersion === "barmancloud.cnpg.io/v1" && kind === "ObjectStore") return objectStoreErrors(object);
  const name = packages[apiVersion.split("/")[0]];
  if (name === undefined) return [`no model of ${apiVersion} ${kind}`];
  return errorsOf(join(name, apiVersion), kind, object, "");
}

const objects = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(await Promise.all(objects.map(check))));
