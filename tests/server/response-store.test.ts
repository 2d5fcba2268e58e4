import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { DatabaseResponses } from '../../server/api/response-database.js';
import { itemsBefore, MemoryResponses, sizeOf } from '../../server/api/response-store.js';
import type { ResponseStore, StoredResponse } from '../../server/api/response-store.js';
import { ApiError, StartupError } from '../../server/errors.js';

const folder = mkdtempSync(join(tmpdir(), 'rodin-'));
after(() => rmSync(folder, { recursive: true }));
let numFiles = 0;
const newFile = (): string => join(folder, `${numFiles++}.sqlite`);

function hasDatabase(): boolean {
  try {
    createRequire(import.meta.url)('node:sqlite');
    return true;
  } catch {
    return false;
  }
}

function responseOf(id: string, given: Partial<StoredResponse> = {}): StoredResponse {
  const input = JSON.stringify([{ type: 'message', id: `in-${id}`, role: 'user', content: [] }]);
  const output = [{ type: 'message', id: `out-${id}`, role: 'assistant', content: [] }];
  const body = JSON.stringify({ id, object: 'response', status: given.status ?? 'completed', error: null, output });
  return { id, tenant: '', previousId: null, status: 'completed', input, body, ...given };
}

const STORES: [string, (maxBytes: number) => ResponseStore][] = [
  ['memory', (maxBytes) => new MemoryResponses(maxBytes)],
];
if (hasDatabase()) STORES.push(['SQLite', (maxBytes) => new DatabaseResponses(newFile(), maxBytes)]);

for (const [name, make] of STORES) {
  test(`${name}: responses are found by their own tenant, replaced and deleted`, () => {
    const store = make(1e6);
    store.put(responseOf('a', { tenant: 'one', status: 'queued', previousId: 'before' }));
    assert.equal(store.get('a', 'two'), undefined);
    assert.equal(store.get('a', 'one')!.previousId, 'before');
    const done = responseOf('a', { tenant: 'one' });
    store.put(done);
    assert.deepEqual({ ...store.get('a', 'one') }, done);
    store.delete('a');
    assert.equal(store.get('a', 'one'), undefined);
    store.delete('a');
    store.close();
  });

  test(`${name}: what was used longest ago makes room`, () => {
    const size = sizeOf(responseOf('r0'));
    const store = make(3 * size);
    for (const id of ['r0', 'r1', 'r2']) store.put(responseOf(id));
    assert.ok(store.get('r0', ''));
    store.put(responseOf('r3'));
    assert.equal(store.get('r1', ''), undefined);
    for (const id of ['r0', 'r2', 'r3']) assert.ok(store.get(id, ''), id);
    store.put(responseOf('r4', { body: 'x'.repeat(4 * size) }));
    assert.equal(store.get('r4', ''), undefined);
    assert.ok(store.get('r3', ''));
    store.close();
  });

  test(`${name}: a conversation is all its turns, or an error that names the one that is gone`, () => {
    const store = make(1e6);
    store.put(responseOf('a'));
    store.put(responseOf('b', { previousId: 'a' }));
    store.put(responseOf('c', { previousId: 'b' }));
    const ids = itemsBefore('c', '', store).map(({ id }) => id);
    assert.deepEqual(ids, ['in-a', 'out-a', 'in-b', 'out-b', 'in-c', 'out-c']);
    const fails = (id: string, words: RegExp): void =>
      assert.throws(
        () => itemsBefore(id, '', store),
        (error) => error instanceof ApiError && error.param === 'previous_response_id' && words.test(error.message),
      );
    store.delete('b');
    fails('c', /'b', which it goes on with, is gone/);
    fails('b', /There is no response 'b'/);
    store.put(responseOf('d', { status: 'in_progress' }));
    fails('d', /still being made/);
    store.close();
  });
}

test('SQLite keeps responses over a restart; what was not finished has failed', { skip: !hasDatabase() }, () => {
  const file = newFile();
  const first = new DatabaseResponses(file, 1e6);
  first.put(responseOf('done'));
  first.put(responseOf('cut', { status: 'in_progress' }));
  first.close();
  const second = new DatabaseResponses(file, 1e6);
  assert.equal(second.get('done', '')!.status, 'completed');
  const cut = second.get('cut', '')!;
  const { status, error } = JSON.parse(cut.body);
  assert.deepEqual([cut.status, status, error.code], ['failed', 'failed', 'server_error']);
  second.close();
  const size = sizeOf(responseOf('done'));
  const other = new DatabaseResponses(file, 1e6);
  assert.throws(() => new DatabaseResponses(file, 1e6), /cannot be used: database is locked/);
  other.close();
  const small = new DatabaseResponses(file, size + 300);
  small.put(responseOf('next'));
  assert.equal(small.get('done', ''), undefined);
  assert.ok(small.get('next', ''));
  small.close();
});

test('where there is no database to be had, the start is refused with a sentence', () => {
  const file = newFile();
  writeFileSync(file, 'no database, and long enough to be none: '.repeat(50));
  const words = hasDatabase() ? /cannot be used: .*not a database/ : /which Node has from 22\.13 on; this is Node 20/;
  assert.throws(
    () => new DatabaseResponses(file, 1e6),
    (error) => error instanceof StartupError && words.test(error.message),
  );
});
