import type { BenchCase, BenchReport } from './step.js';

/** The report as text for a terminal. */
export function formatReport(report: BenchReport): string {
  const { ceilings } = report;
  const head = [
    `${report.model} (${report.weights} weights, ${report.numLayers} layers, ${gb(report.weightBytes)} GB)`,
    `${report.device}, ${report.numThreads} threads; loaded in ${report.loadSeconds.toFixed(1)} s`,
    `ceilings: reads ${known(ceilings.readBytesPerSecond, gb)} GB/s, products ${known(ceilings.flopsPerSecond, tera)} TFLOP/s`,
  ];
  const rows = report.cases.map((one) => [
    nameOf(one),
    String(one.numSteps),
    one.minMs.toFixed(3),
    one.medianMs.toFixed(3),
    one.p90Ms.toFixed(3),
    one.deviceMs.toFixed(3),
    (1000 * one.idleMs).toFixed(0),
    one.tokensPerSecond.toFixed(1),
    (one.bytesPerStep / 1e6).toFixed(1),
    gb(one.bytesPerSecond),
    percent(one.bandwidthShare),
    tera(one.flopsPerSecond),
    percent(one.flopsShare),
  ]);
  const titles = [
    'case',
    'steps',
    'min ms',
    'median ms',
    'p90 ms',
    'device ms',
    'idle us',
    'tokens/s',
    'MB/step',
    'GB/s',
    'of reads',
    'TFLOP/s',
    'of products',
  ];
  return [...head, '', ...formatTable([titles, ...rows])].join('\n');
}

function nameOf({ kind, numSequences, numTokens, context, isAhead }: BenchCase): string {
  if (kind === 'prefill') return `prefill ${numTokens}`;
  return `decode ${numSequences} @ ${context}${isAhead ? ', ahead' : ''}`;
}

/** Lines of a table whose first row are the titles; the first column is flush left, the others right. */
export function formatTable(table: readonly string[][]): string[] {
  const widths = table[0]!.map((_, column) => Math.max(...table.map((row) => row[column]!.length)));
  return table.map((row) => row.map((cell, column) => pad(cell, widths[column]!, column === 0)).join('  '));
}

function pad(cell: string, width: number, isLeft: boolean): string {
  return isLeft ? cell.padEnd(width) : cell.padStart(width);
}

export function gb(value: number): string {
  return (value / 1e9).toFixed(2);
}

export function tera(value: number): string {
  return (value / 1e12).toFixed(3);
}

export function known(value: number, format: (value: number) => string): string {
  return value > 0 ? format(value) : '(not measured)';
}

export function percent(share: number | null): string {
  return share === null ? '-' : `${(100 * share).toFixed(1)} %`;
}
