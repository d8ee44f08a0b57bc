//! What is seen of a run while it trains: the bar, and in a cell the loss curve, which grows.

use super::state::TrainerState;
use crate::display::{Live, Pace, Progress};

const CURVES_PER_SECOND: u32 = 2;

/// How a call of `train` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The last update is done, or a callback asked to stop.
    Complete,
    /// `train_steps` has made its updates.
    Limit,
    Interrupted,
    /// By an error.
    Failed,
}

/// The bar and the curve of one call.
///
/// The curve appears with the first loss, whatever the clock says, and its last state depends on
/// the losses alone: two runs of a notebook store the same picture.
pub(super) struct View {
    pub bar: Progress,
    curve: Option<Live>,
    pace: Pace,
    on: bool,
}

impl View {
    pub fn new(state: &TrainerState) -> Self {
        let bar = Progress::starting_at("Training", state.global_step, state.max_steps, "steps");
        Self { bar, curve: None, pace: Pace::per_second(CURVES_PER_SECOND), on: Live::is_possible() }
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        Self { bar: Progress::silent(), curve: None, pace: Pace::per_second(CURVES_PER_SECOND), on: false }
    }

    /// Something was logged: the curve grows.
    pub fn logged(&mut self, state: &TrainerState) {
        if self.on && state.has_losses() && self.pace.is_due() {
            self.draw(state, "Loss");
        }
    }

    /// Leaves bar and curve in the state in which the call ends.
    pub fn end(&mut self, end: End, state: &TrainerState) {
        match end {
            End::Complete | End::Limit => self.bar.finish(),
            End::Interrupted => self.bar.interrupted(),
            // The bar says so itself when it goes.
            End::Failed => {}
        }
        if self.curve.is_some() {
            let at = format!("at {} of {} steps", state.global_step, state.max_steps);
            let title = match end {
                End::Complete | End::Limit => "Loss".into(),
                End::Interrupted => format!("Loss, interrupted {at}"),
                End::Failed => format!("Loss, stopped by an error {at}"),
            };
            self.draw(state, &title);
        }
    }

    /// Whether the cell shows the curve.
    pub fn has_curve(&self) -> bool {
        self.curve.is_some()
    }

    fn draw(&mut self, state: &TrainerState, title: &str) {
        let forms = state.loss_curve_with(title).forms();
        match &self.curve {
            Some(live) => live.update(&forms),
            None => {
                // The bar stands above the curve.
                self.bar.show();
                self.curve = Some(Live::show(&forms, false));
            }
        }
    }
}
