import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';
import { Contract } from '../../server/api/contract.js';
import { BRANCH_TAGS } from '../../server/api/validation-error.js';
import { FIELDS, fieldsText, README, withFields } from './fields.js';
import { DOCUMENT, startHarness } from './harness.js';

const root = fileURLToPath(new URL('../..', import.meta.url));

function walk(node: unknown, visit: (node: Record<string, any>, path: string) => void, path = ''): void {
  if (typeof node !== 'object' || node === null) return;
  if (!Array.isArray(node)) visit(node as Record<string, any>, path);
  for (const [key, value] of Object.entries(node)) walk(value, visit, `${path}/${key}`);
}

test('the generated types are those of the document', () => {
  const manifest = createRequire(import.meta.url).resolve('openapi-typescript/package.json');
  const script = join(dirname(manifest), JSON.parse(readFileSync(manifest, 'utf8')).bin['openapi-typescript']);
  execFileSync(process.execPath, [script, 'openapi/openapi.yaml', '-o', 'server/api/openapi.d.ts', '--check'], {
    cwd: root,
    stdio: 'pipe',
  });
});

test('every operation of the document is routed, and nothing else is', async () => {
  const { app, close } = startHarness();
  await app.ready();
  const { operations } = Contract.read();
  assert.ok(operations.length >= 8);
  for (const { method, url } of operations) assert.ok(app.hasRoute({ method, url }), `${method} ${url}`);
  const groups = app.printRoutes({ commonPrefix: false }).matchAll(/\(((?:[A-Z]+(?:, )?)+)\)/g);
  const routed = [...groups].flatMap(([, methods]) => methods!.split(', ').filter((method) => method !== 'HEAD'));
  // One more than the document has: ids with unescaped slashes.
  assert.equal(routed.length, operations.length + 1);
  await close();
});

test('every field of the document is described, and every operation has an id', () => {
  const document = parse(readFileSync(DOCUMENT, 'utf8'));
  const bare: string[] = [];
  walk(document.components.schemas, (node, path) => {
    if (!/\/properties\/[^/]+$/.test(path) || node['$ref']) return;
    if (typeof node['description'] !== 'string') bare.push(path);
  });
  assert.deepEqual(bare, []);
  for (const path of Object.values<any>(document.paths))
    for (const node of Object.values<any>(path)) assert.ok(node.operationId);
});

test('the tags that errors name are those of the document', () => {
  const { schemas } = parse(readFileSync(DOCUMENT, 'utf8')).components;
  const tags: Record<string, string[]> = {};
  const visit = (name: string): void =>
    walk(schemas[name], (node) => {
      const branches = node['x-tag'] === undefined ? [] : node['oneOf'].map((branch: any) => nameOf(branch.$ref));
      for (const branch of branches) {
        tags[branch] = schemas[branch].properties[node['x-tag']].enum;
        visit(branch);
      }
      if (typeof node['$ref'] === 'string') visit(nameOf(node['$ref']));
    });
  const nameOf = (ref: string): string => ref.split('/').at(-1)!;
  for (const { bodyRef } of Contract.read().operations) if (bodyRef) visit(nameOf(bodyRef));
  assert.deepEqual(BRANCH_TAGS, tags);
});

test('the document says the version of the package', () => {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
  assert.equal(parse(readFileSync(DOCUMENT, 'utf8')).info.version, version);
  assert.ok(existsSync(join(root, 'openapi/openapi.yaml')));
});

test('the tables of fields are those of the contract', () => {
  assert.equal(readFileSync(FIELDS, 'utf8'), fieldsText());
  const readme = readFileSync(README, 'utf8');
  assert.equal(readme, withFields(readme));
});
