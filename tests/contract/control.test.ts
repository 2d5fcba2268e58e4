import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { ControlMark } from '../../server/engine/request.js';
import type { Script } from './fake-engine.js';
import { DOCUMENT, QUESTION, startHarness, validatorsOf, type Harness } from './harness.js';

const validate = validatorsOf(DOCUMENT)('Control');
const MARKS: ControlMark[] = [{ kind: 'extend', at: 1, untilReasoning: 31 }];

async function until(condition: () => boolean): Promise<void> {
  for (let i = 0; !condition(); i++) {
    assert.ok(i < 400, 'waited too long');
    await sleep(5);
  }
}

/** Reasons on and on, and says from `isTold` on what a client has asked. */
function endless(harness: () => Harness, isTold: () => boolean): Script {
  return function* () {
    const [token] = harness().tokens('Hm', 'reasoning');
    for (;;) yield* [{ tokens: [token!], ...(isTold() ? { controls: MARKS } : {}) }, sleep(2)];
  };
}

for (const isTold of [true, false]) {
  test(`a control is kept when the client leaves, ${isTold ? 'where it took effect' : 'to take effect'}`, async () => {
    let tells = false;
    const harness: Harness = startHarness({
      script: endless(
        () => harness,
        () => tells,
      ),
    });
    const { engine } = harness;
    const url = await harness.listen();
    const controller = new AbortController();
    const response = await fetch(`${url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ ...QUESTION, stream: true }),
      signal: controller.signal,
    });
    const reader = response.body!.getReader();
    const first = Buffer.from((await reader.read()).value).toString();
    const [, lastId, id] = /id: (([^:]+):\d+)/.exec(first)!;
    const answer = await fetch(`${url}/v1/chat/completions/${id}/control`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ action: 'extend_thinking', tokens: 30 }),
    });
    const body = await answer.json();
    assert.ok(validate(body), JSON.stringify(body));
    assert.deepEqual(engine.controls, [[id, { kind: 'extend', numTokens: 30 }]]);
    tells = isTold;
    await sleep(30);
    controller.abort();
    await until(() => engine.aborted.length === 1);

    const again = new AbortController();
    const resumed = await fetch(`${url}/v1/chat/completions`, {
      headers: { 'last-event-id': lastId! },
      signal: again.signal,
    });
    assert.equal(resumed.status, 200);
    await until(() => engine.requests.length === 2);
    const request = engine.requests[1]!;
    assert.deepEqual(request.controls, isTold ? MARKS : undefined);
    assert.deepEqual(engine.controls.slice(1), isTold ? [] : [[`${id}.2`, { kind: 'extend', numTokens: 30 }]]);
    assert.ok(request.resumedIds!.length > 0);
    again.abort();
    await until(() => engine.aborted.length === 2);
    await harness.close();
  });
}
