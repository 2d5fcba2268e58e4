import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { parse, parseAllDocuments } from 'yaml';
import { Contract } from '../../server/api/contract.js';
import { readCommandLine } from '../../server/config.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const DEPLOY = join(ROOT, 'deploy');

/** kind -> where its type is */
const TYPES: Record<string, string> = {
  Deployment: 'kubernetes-types/apps/v1.js',
  Service: 'kubernetes-types/core/v1.js',
  PodDisruptionBudget: 'kubernetes-types/policy/v1.js',
  PodMonitor: './custom-resources.js',
  InferencePool: './custom-resources.js',
  HTTPRoute: './custom-resources.js',
  LeaderWorkerSet: './custom-resources.js',
  Kustomization: './custom-resources.js',
  Component: './custom-resources.js',
};

const files = readdirSync(DEPLOY, { recursive: true, encoding: 'utf8' })
  .filter((path) => path.endsWith('.yaml'))
  .map((path) => join(DEPLOY, path));

const manifests = new Map(files.map((path) => [path, parse(readFileSync(path, 'utf8'), { version: '1.1' })]));
const overlays = readdirSync(join(DEPLOY, 'overlays')).map((name) => join(DEPLOY, 'overlays', name));

/** A patch says part of a resource. */
function isPatch(path: string): boolean {
  return path.includes('/components/') && path.endsWith('/deployment.yaml');
}

/** What the published types have against the documents: unknown and missing fields, wrong types. */
function problemsOf(documents: readonly { name: string; value: any; isPartial: boolean }[]): string[] {
  const lines = documents.map(({ name, value, isPartial }, index) => {
    const from = TYPES[value.kind];
    assert.ok(from, `${name}: the test knows no type of ${value.kind}`);
    const type = isPartial ? `Part<import('${from}').${value.kind}>` : `import('${from}').${value.kind}`;
    return `export const manifest${index}: ${type} = ${JSON.stringify(value)};`;
  });
  const part =
    'type Part<T> = T extends (infer Item)[] ? Part<Item>[] : T extends object ? { [Key in keyof T]?: Part<T[Key]> } : T;';
  const source = [...lines, part].join('\n');
  const path = join(ROOT, 'tests/deploy/manifests-to-check.ts');
  const options: ts.CompilerOptions = {
    strict: true,
    noEmit: true,
    module: ts.ModuleKind.NodeNext,
    target: ts.ScriptTarget.ES2022,
    skipLibCheck: true,
    types: [],
  };
  const host = ts.createCompilerHost(options);
  const disk = { ...host };
  host.fileExists = (name) => name === path || disk.fileExists(name);
  host.readFile = (name) => (name === path ? source : disk.readFile(name));
  host.getSourceFile = (name, ...rest) =>
    name === path ? ts.createSourceFile(name, source, ts.ScriptTarget.ES2022) : disk.getSourceFile(name, ...rest);
  const program = ts.createProgram([path], options, host);
  return ts.getPreEmitDiagnostics(program).map((diagnostic) => {
    const line = source.slice(0, diagnostic.start).split('\n').length - 1;
    return `${documents[line]?.name ?? diagnostic.file?.fileName}: ${ts.flattenDiagnosticMessageText(diagnostic.messageText, ' ')}`;
  });
}

/** The documents of an overlay, as kubectl makes them. */
function render(overlay: string): any[] {
  const text = execFileSync('kubectl', ['kustomize', overlay], { encoding: 'utf8' });
  return parseAllDocuments(text).map((document) => document.toJS());
}

function podOf(document: any): any {
  return document.spec.leaderWorkerTemplate?.workerTemplate ?? document.spec.template;
}

function variablesOf(container: any): Record<string, string> {
  return Object.fromEntries(container.env.map(({ name, value }: any) => [name, value ?? '10.0.0.1']));
}

test('every manifest is what the published types say', () => {
  const documents = [...manifests].map(([name, value]) => ({ name, value, isPartial: isPatch(name) }));
  assert.ok(documents.length > 15);
  assert.deepEqual(problemsOf(documents), []);
});

test('the check finds unknown fields, wrong types and missing ones', () => {
  const [path, value] = [...manifests].find(([name]) => name.endsWith('base/deployment.yaml'))!;
  const broken = structuredClone(value);
  broken.spec.template.spec.containers[0].readinessProb = {};
  broken.spec.replicas = 'two';
  delete broken.spec.selector;
  assert.equal(problemsOf([{ name: path, value: broken, isPartial: false }]).length >= 1, true);
  for (const change of [
    (copy: any) => (copy.spec.template.spec.containers[0].readinessProb = {}),
    (copy: any) => (copy.spec.replicas = 'two'),
    (copy: any) => delete copy.spec.selector,
  ]) {
    const copy = structuredClone(value);
    change(copy);
    const problems = problemsOf([{ name: path, value: copy, isPartial: false }]);
    assert.equal(problems.length, 1, problems.join('\n'));
  }
});

test('every file that a kustomization names is there, and every file is named by one', () => {
  const named = new Set<string>();
  for (const [path, { kind, resources = [], components = [], patches = [] }] of manifests) {
    if (kind !== 'Kustomization' && kind !== 'Component') continue;
    for (const name of [...resources, ...components, ...patches.map((patch: any) => patch.path)]) {
      const target = resolve(dirname(path), name);
      assert.ok(existsSync(target), `${path} names ${name}`);
      named.add(target.endsWith('.yaml') ? target : join(target, 'kustomization.yaml'));
    }
  }
  const tops = overlays.map((overlay) => join(overlay, 'kustomization.yaml'));
  assert.deepEqual(
    files.filter((file) => !named.has(file) && !tops.includes(file)),
    [],
  );
});

test('variables are flags that can be parsed, probes are routes, ports and images are those that there are', () => {
  const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string };
  const routes = Contract.read().operations.map(({ path }) => path);
  let numVariables = 0;
  for (const [path, document] of manifests) {
    if (document.kind !== 'Deployment' && document.kind !== 'LeaderWorkerSet') continue;
    const [container] = podOf(document).spec.containers;
    const variables = variablesOf(container);
    const command = readCommandLine(['serve'], variables);
    assert.ok(command.kind === 'serve');
    assert.deepEqual(command.config.warnings, [], path);
    numVariables += Object.keys(variables).length;
    if (container.image) assert.match(container.image, new RegExp(`^rodin:${version.replaceAll('.', '\\.')}(-cuda)?$`));
    if (isPatch(path)) continue;
    const ports = container.ports.map(({ name }: any) => name);
    for (const probe of ['startupProbe', 'readinessProbe', 'livenessProbe']) {
      assert.ok(routes.includes(container[probe].httpGet.path), `${path}: ${probe}`);
      assert.ok(ports.includes(container[probe].httpGet.port));
    }
  }
  assert.ok(numVariables > 10);
});

test('a pod that ends has time for what runs: preStop, then --shutdown-timeout, then its end', () => {
  for (const [path, document] of manifests) {
    if (isPatch(path) || (document.kind !== 'Deployment' && document.kind !== 'LeaderWorkerSet')) continue;
    const { containers, terminationGracePeriodSeconds } = podOf(document).spec;
    const [, sleep] = containers[0].lifecycle.preStop.exec.command;
    const drain = Number(variablesOf(containers[0]).RODIN_SHUTDOWN_TIMEOUT);
    assert.ok(drain > 0 && terminationGracePeriodSeconds >= Number(sleep) + drain + 5, path);
    assert.equal(containers[0].securityContext.readOnlyRootFilesystem, true);
    assert.equal(podOf(document).spec.securityContext.runAsNonRoot, true);
  }
});

const kubectl = spawnSync('kubectl', ['version', '--client']).status === 0;

test(
  'overlays render to manifests that are valid, and that find each other',
  {
    skip: kubectl ? false : 'kubectl is not installed: overlays were not rendered, each file alone was checked',
  },
  () => {
    for (const overlay of overlays) {
      const documents = render(overlay);
      const named = documents.map((value) => ({ name: `${overlay} ${value.kind}`, value, isPartial: false }));
      assert.deepEqual(problemsOf(named), []);
      const workload = documents.find(({ kind }) => kind === 'Deployment' || kind === 'LeaderWorkerSet');
      const pod = podOf(workload);
      const { ports } = pod.spec.containers[0];
      for (const { kind, spec } of documents) {
        const selector = kind === 'Service' ? spec.selector : spec.selector?.matchLabels;
        for (const [label, value] of Object.entries(selector ?? {}))
          assert.equal(pod.metadata.labels[label], value, kind);
        if (kind === 'Service') assert.ok(ports.some(({ name }: any) => name === spec.ports[0].targetPort));
        if (kind === 'PodMonitor') assert.ok(ports.some(({ name }: any) => name === spec.podMetricsEndpoints[0].port));
        if (kind === 'InferencePool') {
          assert.deepEqual(
            spec.targetPorts.map(({ number }: any) => number),
            [ports.find(({ name }: any) => name === 'http').containerPort],
          );
        }
      }
    }
  },
);
