import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Engine } from '../../server/engine/engine.js';
import { loadAddon } from '../../server/engine/load-addon.js';
import type { EmittedToken, EngineEvent, EngineRequest } from '../../server/engine/request.js';
import { startEngine } from '../../server/engine/start-engine.js';
import { ENGINE_CONFIG, evaluationPrompts, makeRequests } from '../helpers/speculation-workload.js';

const NUM_REQUESTS = 72;

async function eventsOf(engine: Engine, request: EngineRequest): Promise<EngineEvent[]> {
  const events: EngineEvent[] = [];
  for await (const event of engine.submit(request)) events.push(event);
  return events;
}

function tokensOf(events: readonly EngineEvent[]): EmittedToken[] {
  return events.flatMap(({ tokens }) => tokens);
}

test('a completion that is aborted anywhere goes on with the same tokens, log-probabilities and end', async () => {
  const engine = await startEngine(loadAddon(), { ...ENGINE_CONFIG, speculativeTokens: 1 });
  try {
    const requests = makeRequests(await evaluationPrompts(), NUM_REQUESTS);
    let numCuts = 0;
    for (const [index, request] of requests.entries()) {
      const whole = await eventsOf(engine, request);
      for (const cut of [1, 2 + (index % 5), whole.length - 1]) {
        if (cut < 1 || cut >= whole.length) continue;
        numCuts++;
        const resumedIds = tokensOf(whole.slice(0, cut)).map(({ id }) => id);
        const rest = await eventsOf(engine, { ...request, requestId: `${request.requestId}-${cut}`, resumedIds });
        assert.deepEqual(tokensOf(rest), tokensOf(whole.slice(cut)), `request ${index} behind event ${cut}`);
        const [end, expected] = [rest.at(-1)!, whole.at(-1)!];
        assert.deepEqual(
          [end.finishReason, end.stopTokenId, end.reasoningEnded],
          [expected.finishReason, expected.stopTokenId, expected.reasoningEnded],
        );
        assert.ok(end.cachedTokens <= request.promptIds.length);
      }
    }
    assert.ok(numCuts > NUM_REQUESTS);
    const over = { ...requests[0]!, requestId: 'over', resumedIds: [1] };
    assert.throws(() => engine.submit(over), /ends this completion/);
    engine.checkInvariant();
  } finally {
    await engine.close();
  }
});
