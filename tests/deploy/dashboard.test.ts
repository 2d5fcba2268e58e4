import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { QUESTION, startHarness } from '../contract/harness.js';

const FILE = new URL('../../deploy/grafana/rodin.json', import.meta.url);

/** Labels that Prometheus adds to what it scrapes. */
const OF_PROMETHEUS = new Set(['instance', 'le']);

/** Metric name -> labels that it has been seen with. */
function seriesOf(text: string): Map<string, Set<string>> {
  const series = new Map<string, Set<string>>();
  for (const line of text.split('\n')) {
    const match = /^([\w:]+)(?:\{(.*)\})? \S+$/.exec(line);
    if (!match) continue;
    const labels = series.get(match[1]!) ?? new Set();
    for (const [, label] of (match[2] ?? '').matchAll(/(\w+)="/g)) labels.add(label!);
    series.set(match[1]!, labels);
  }
  return series;
}

test('every metric and label that the dashboard asks for is in /metrics', async () => {
  const { app, chat, engine, close } = startHarness();
  try {
    const { script } = engine;
    engine.script = function* (request) {
      let first: object = { queueMs: 1 };
      for (const step of script(request)) {
        yield step instanceof Promise ? step : { ...step, ...first, reasoningEnded: 'budget' };
        first = {};
      }
    };
    await chat(QUESTION);
    const series = seriesOf((await app.inject('/metrics')).body);
    const { panels, templating } = JSON.parse(readFileSync(FILE, 'utf8'));
    const targets = panels.flatMap((panel: any) => panel.targets ?? []);
    assert.ok(targets.length > 30);
    const queries = [
      ...targets.map(({ expr, legendFormat }: any) => ({ expr, legend: legendFormat })),
      ...templating.list.flatMap(({ definition }: any) => (definition ? [{ expr: definition, legend: '' }] : [])),
    ];
    const asked = new Set<string>();
    for (const { expr, legend } of queries) {
      const names = [...expr.matchAll(/\b(?:vllm|rodin):\w+/g)].map(([name]) => name);
      assert.ok(names.length > 0, expr);
      const labels = [
        ...[...expr.matchAll(/(\w+)=~?"/g)].map(([, label]) => label!),
        ...[...expr.matchAll(/by \(([^)]+)\)/g)].flatMap(([, list]) => list!.split(', ')),
        ...[...legend.matchAll(/\{\{(\w+)\}\}/g)].map(([, label]) => label!),
      ].filter((label) => !OF_PROMETHEUS.has(label));
      for (const name of names) {
        asked.add(name);
        assert.ok(series.has(name), `${name} is not in /metrics`);
        const known = series.get(name)!;
        if (names.length === 1)
          for (const label of labels) assert.ok(known.has(label), `${name} has no label ${label}`);
        assert.equal(
          name.endsWith('_total') || name.endsWith('_bucket') || /_(sum|count)$/.test(name),
          expr.includes(`${name}{`) && /(rate|increase)\(/.test(expr.slice(0, expr.indexOf(name))),
          `${name}: counters are rates, gauges are not`,
        );
      }
    }
    // And the other way round: nothing that Rodin measures itself is shown nowhere.
    const own = [...series.keys()].filter((name) => /^(vllm|rodin):/.test(name)).map(baseOf);
    const shown = new Set([...asked].map(baseOf));
    const hidden = [...new Set(own)].filter((name) => !shown.has(name));
    assert.deepEqual(hidden.sort(), [
      'vllm:cache_config_info',
      'vllm:request_params_max_tokens',
      'vllm:request_success_total',
    ]);
  } finally {
    await close();
  }
});

function baseOf(name: string): string {
  return name.replace(/_(bucket|sum|count)$/, '');
}

test('panels have ids of their own, a source and a place of their own', () => {
  const { panels } = JSON.parse(readFileSync(FILE, 'utf8'));
  assert.equal(new Set(panels.map(({ id }: any) => id)).size, panels.length);
  const taken = new Set<string>();
  for (const { gridPos, datasource, type, title } of panels) {
    if (type !== 'row') assert.equal(datasource.uid, '${datasource}', title);
    for (let x = gridPos.x; x < gridPos.x + gridPos.w; x++) {
      for (let y = gridPos.y; y < gridPos.y + gridPos.h; y++) {
        assert.ok(x < 24 && !taken.has(`${x},${y}`), `${title} overlaps`);
        taken.add(`${x},${y}`);
      }
    }
  }
});
