import type { LoadResult } from './load.js';

export interface Quantiles {
  median: number;
  p90: number;
  p99: number;
  num: number;
}

/** Latencies in ms; null where no request had any. */
export interface Report {
  requests: number;
  failed: number;
  skipped: number;
  seconds: number;
  requestsPerSecond: number;
  outputTokensPerSecond: number;
  totalTokensPerSecond: number;
  promptTokens: number;
  cachedTokens: number;
  completionTokens: number;
  latencies: Record<'ttft' | 'ttfa' | 'itl' | 'tpot' | 'e2e', Quantiles | null>;
  /** message -> how often */
  errors: Record<string, number>;
}

/** Failed requests count as failures alone: neither their times nor their tokens are in the figures. */
export function reportOf({ samples, numSkipped, seconds }: LoadResult): Report {
  const good = samples.filter(({ error }) => error === null);
  const errors: Record<string, number> = {};
  for (const { error } of samples) if (error !== null) errors[error] = (errors[error] ?? 0) + 1;
  const sum = (of: (sample: (typeof good)[number]) => number): number => good.reduce((all, one) => all + of(one), 0);
  const promptTokens = sum((sample) => sample.promptTokens);
  const completionTokens = sum((sample) => sample.completionTokens);
  return {
    requests: samples.length,
    failed: samples.length - good.length,
    skipped: numSkipped,
    seconds,
    requestsPerSecond: good.length / seconds,
    outputTokensPerSecond: completionTokens / seconds,
    totalTokensPerSecond: (promptTokens + completionTokens) / seconds,
    promptTokens,
    cachedTokens: sum((sample) => sample.cachedTokens),
    completionTokens,
    latencies: {
      ttft: quantilesOf(good.flatMap(({ firstTokenAt, dueAt }) => (firstTokenAt === null ? [] : firstTokenAt - dueAt))),
      ttfa: quantilesOf(
        good.flatMap(({ firstAnswerAt, dueAt }) => (firstAnswerAt === null ? [] : firstAnswerAt - dueAt)),
      ),
      itl: quantilesOf(good.flatMap(({ gapsMs }) => gapsMs)),
      tpot: quantilesOf(
        good.flatMap(({ firstTokenAt, lastTokenAt, completionTokens: num }) =>
          firstTokenAt === null || lastTokenAt === null || num < 2 ? [] : (lastTokenAt - firstTokenAt) / (num - 1),
        ),
      ),
      e2e: quantilesOf(good.map(({ endedAt, dueAt }) => endedAt - dueAt)),
    },
    errors,
  };
}

/** Nearest rank: each is a value that was measured. */
export function quantilesOf(values: readonly number[]): Quantiles | null {
  if (values.length === 0) return null;
  const sorted = values.toSorted((a, b) => a - b);
  const at = (share: number): number => sorted[Math.ceil(share * sorted.length) - 1]!;
  return { median: at(0.5), p90: at(0.9), p99: at(0.99), num: sorted.length };
}

export function tableOf(report: Report): string {
  const { latencies, errors } = report;
  const lines = [
    `requests ${report.requests}, failed ${report.failed}, skipped ${report.skipped}, ${report.seconds.toFixed(2)} s`,
    `prompt tokens ${report.promptTokens} (${report.cachedTokens} cached), completion tokens ${report.completionTokens}`,
    `${report.requestsPerSecond.toFixed(2)} requests/s, ${report.outputTokensPerSecond.toFixed(1)} output tokens/s, ` +
      `${report.totalTokensPerSecond.toFixed(1)} tokens/s in all`,
    '',
    '| ms | median | p90 | p99 | n |',
    '|---|---|---|---|---|',
  ];
  for (const [name, quantiles] of Object.entries(latencies)) {
    const cells = quantiles
      ? [quantiles.median, quantiles.p90, quantiles.p99].map((value) => value.toFixed(2))
      : ['-', '-', '-'];
    lines.push(`| ${name.toUpperCase()} | ${cells.join(' | ')} | ${quantiles?.num ?? 0} |`);
  }
  for (const [error, count] of Object.entries(errors)) lines.push(`${count} x ${error}`);
  return lines.join('\n');
}
