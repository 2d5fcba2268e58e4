import { packStep, unpackStep } from '../../server/engine/pack-step.js';
import type { EngineEvent } from '../../server/engine/request.js';
import type { Scheduler } from '../../server/engine/scheduler.js';
import type { StepResult } from '../../server/engine/step-batch.js';
import type { StepPlan } from '../../server/engine/step-plan.js';
import type { FakeRunner } from './fake-runner.js';

/** The engine's loop without promises. isAhead: each step runs before the one ahead of it is committed, where it may. */
export class StepDriver {
  readonly #scheduler: Scheduler;
  readonly #runner: FakeRunner;
  readonly #isAhead: boolean;
  /** run and not committed */
  #underWay: { plan: StepPlan; result: StepResult } | null = null;

  constructor(scheduler: Scheduler, runner: FakeRunner, isAhead: boolean) {
    this.#scheduler = scheduler;
    this.#runner = runner;
    this.#isAhead = isAhead;
  }

  /** One step's events; null where there is none. onRun is called between running and committing it. */
  step(onRun: () => void = () => {}, onPlan: (plan: StepPlan) => void = () => {}): EngineEvent[] | null {
    const step = this.#underWay ?? this.#run(this.#scheduler.schedule(), onPlan);
    if (step === null) return null;
    this.#underWay = this.#isAhead ? this.#run(this.#scheduler.scheduleAhead(step.plan), onPlan) : null;
    onRun();
    return this.#scheduler.commit(step.plan, unpackStep(step.plan, step.result, this.#runner.options.vocabSize));
  }

  #run(plan: StepPlan | null, onPlan: (plan: StepPlan) => void): { plan: StepPlan; result: StepResult } | null {
    if (plan === null) return null;
    onPlan(plan);
    return { plan, result: this.#runner.stepNow(packStep(plan, this.#runner.options.blockSize)) };
  }
}
