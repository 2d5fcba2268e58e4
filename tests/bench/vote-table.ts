export const VOTE_DATA = new URL('vote.json', import.meta.url);

/** What voting came to, beside the same chains each alone. */
export interface VoteData {
  model: string;
  date: string;
  temperature: number;
  /** chains that vote */
  n: number;
  tasks: Record<string, VoteTask>;
  /** completion tokens of all chains run to their ends, and with those stopped that could change nothing */
  tokens: { alone: number; voting: number };
}

export interface VoteTask {
  questions: number;
  /** of questions times n */
  rightChains: number;
  rightVotes: number;
}

/** A Markdown table: all questions, then the kinds that chains get wrong most often. */
export function tableOf({ n, tasks, tokens }: VoteData): string {
  const list = Object.entries(tasks);
  const sum = (field: keyof VoteTask): number => list.reduce((total, [, task]) => total + task[field], 0);
  const all = { questions: sum('questions'), rightChains: sum('rightChains'), rightVotes: sum('rightVotes') };
  const worst = list
    .map(([name, task]) => ({ name, task, lost: task.questions - task.rightChains / n }))
    .sort((a, b) => b.lost - a.lost)
    .slice(0, 4);
  const row = (name: string, task: VoteTask): string =>
    `| ${name} | ${task.questions} | ${percent(task.rightChains / n / task.questions)} | ${percent(task.rightVotes / task.questions)} |`;
  return [
    `| | questions | one chain | vote of ${n} |`,
    '|---|---|---|---|',
    row('right, all', all),
    ...worst.map(({ name, task }) => row(name, task)),
    `| completion tokens a question | | ${perQuestion(tokens.alone / n, all)} | ${perQuestion(tokens.voting, all)} |`,
    `| of one chain's | | 1 × | ${((n * tokens.voting) / tokens.alone).toFixed(2)} × |`,
  ].join('\n');
}

function perQuestion(tokens: number, { questions }: VoteTask): string {
  return (tokens / questions).toFixed(1);
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}
