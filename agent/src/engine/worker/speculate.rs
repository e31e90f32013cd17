//! Guesses for the next step, and what they cost.

use std::time::Instant;

use super::super::speculative::{Kind, Settings, ngram};
use super::super::step::Wish;
use super::Worker;

impl Worker {
    /// Lets those that generate guess what follows, where that pays, and plans the step anew with it.
    pub(super) fn speculate(&mut self) {
        let Some(settings) = self.plan.speculative else { return };
        self.forget_drafts();
        let decoding: Vec<usize> = self.step.iter().map(|chunk| chunk.lane).collect();
        let decoding: Vec<usize> = decoding.into_iter().filter(|&lane| self.lanes[lane].todo == 1).collect();
        let mut share = settings.share(decoding.len());
        if self.executor.speculates_in_one_piece() {
            let tokens: u32 = self.step.iter().map(|chunk| chunk.count).sum();
            let left = self.executor.micro_batch_tokens().saturating_sub(tokens) as usize;
            share = share.min(left / decoding.len().max(1));
        }
        // Beside prompts a step is long anyway and tells nothing about its price.
        let is_bare = decoding.len() == self.step.len();
        if share == 0 || (is_bare && self.price.is_stale()) {
            return;
        }
        let mut wishes: Vec<(usize, usize)> = Vec::with_capacity(decoding.len());
        for lane in decoding {
            let sequence = &self.running[lane];
            let most = share.min(sequence.guessable());
            match sequence.speculation.record.length(most, settings.adapts()) {
                // It pauses, or ends soon.
                0 => {}
                length => wishes.push((lane, length.max(settings.min).min(most))),
            }
        }
        match settings.kind {
            Kind::NGram { matching } => self.guess_from_the_past(&wishes, matching),
            Kind::Draft | Kind::Mtp => self.guess_by_model(&wishes, settings),
        }
        let mut guessed = false;
        for (lane, _) in wishes {
            let draft = &mut self.running[lane].speculation.draft;
            if draft.len() < settings.min {
                draft.clear();
            }
            guessed |= !draft.is_empty();
        }
        if guessed {
            self.schedule();
        }
    }

    fn guess_from_the_past(&mut self, wishes: &[(usize, usize)], matching: usize) {
        for &(lane, most) in wishes {
            let sequence = &mut self.running[lane];
            let index = sequence.speculation.index.get_or_insert_with(|| ngram::Index::new(matching));
            let mut draft = index.guess(&sequence.tokens, most);
            // What stands for a picture is no token of the model.
            draft.truncate(draft.iter().take_while(|&&token| self.model.has(token)).count());
            sequence.speculation.draft = draft;
        }
    }

    fn guess_by_model(&mut self, wishes: &[(usize, usize)], settings: Settings) {
        let running = &self.running;
        let mut work: Vec<Wish<'_>> = wishes
            .iter()
            .filter_map(|&(lane, most)| {
                let sequence = &running[lane];
                // It sees no pictures.
                let id = sequence.cells.filter(|_| !sequence.has_pictures())?;
                Some(Wish { id, lane, tokens: &sequence.tokens, most, draft: Vec::new() })
            })
            .collect();
        // What it has not read yet of a prompt it reads in pieces, as the model does beside streams.
        let piece = self.limits().mixed;
        self.executor.draft(&mut work, piece, settings.min_probability);
        let drafts: Vec<_> = work.into_iter().map(|wish| (wish.lane, wish.draft)).collect();
        for (lane, draft) in drafts {
            self.running[lane].speculation.draft = draft;
        }
    }

    /// Whether the model's own head has to know what the step has read. Beside so many streams that nobody guesses it has not.
    pub(super) fn is_heard(&self) -> bool {
        let settings = self.plan.speculative.filter(|settings| settings.kind == Kind::Mtp);
        settings.is_some_and(|settings| settings.share(self.step.len().max(1)) > 0)
    }

    /// False: there were none.
    pub(super) fn forget_drafts(&mut self) -> bool {
        let mut any = false;
        for sequence in &mut self.running {
            any |= !sequence.speculation.draft.is_empty();
            sequence.speculation.draft.clear();
        }
        any
    }

    /// Learns from a step of `tokens` tokens; it was computed from `started` on, its guesses made from `begun` on.
    pub(super) fn observe(&mut self, tokens: u32, started: Instant, begun: Instant) {
        let guessed: u32 = self.step.iter().map(|chunk| chunk.draft).sum();
        let sequences = self.step.len();
        let now = Instant::now();
        // A step without guesses is as long as its own computing: the draft model may have read along meanwhile.
        let elapsed = now - if guessed == 0 { started } else { begun };
        tracing::trace!(
            tokens,
            sequences,
            guessed,
            running = self.running.len(),
            micros = elapsed.as_micros(),
            since_last_micros = (started - self.last_step).as_micros(),
            "step"
        );
        if guessed == 0 {
            self.pace.observe(tokens, u32::try_from(sequences).unwrap_or(u32::MAX), elapsed);
        } else if tokens as usize == sequences + guessed as usize {
            self.pace.generated(elapsed);
        }
        if self.plan.speculative.is_some() {
            for chunk in self.step.iter().filter(|chunk| chunk.output && chunk.draft == 0) {
                self.running[chunk.lane].speculation.record.pass();
            }
            if tokens as usize == sequences + guessed as usize {
                self.price.observe(sequences, guessed as usize, elapsed);
            }
        }
    }
}
