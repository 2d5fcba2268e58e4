import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { test } from 'node:test';
import { promisify } from 'node:util';

const run = promisify(execFile);
const SCRIPT = ['--import', 'tsx', 'tests/bench/speculation.ts'];

test('speculation.ts: numbers of drafts in turns, with what was accepted', async () => {
  const args = ['--drafts', '0,1', '--rounds', '1', '--prompts', '1', '--no-http', '--threads', '1'];
  const { stdout } = await run(process.execPath, [...SCRIPT, ...args]);
  const rows = stdout
    .trim()
    .split('\n')
    .slice(2)
    .map((line) => line.split('|').map((cell) => cell.trim()));
  assert.deepEqual(
    rows.map((cells) => cells.slice(1, 3)),
    [
      ['in process', '0'],
      ['in process', '1'],
    ],
  );
  assert.equal(rows[0]![5], '1.00');
  for (const cells of rows) assert.ok(Number(cells[3]) > 0, cells.join(' '));
  // pocket-r1's first draft is nearly always right.
  assert.equal(rows[1]![6], '1.0');
  assert.ok(Number(rows[1]![7]) > 0.9, rows[1]!.join(' '));
});

test('speculation.ts refuses what it does not know', async () => {
  await assert.rejects(run(process.execPath, [...SCRIPT, '--drafts', '9']), /--drafts lists 0 to 8 and auto/);
});
