//! What the control socket asks for, carried out between two looks at the machine.

use super::{End, Session, Turn};
use crate::control::messages::{Event, Failure, FailureKind, State};
use crate::vm::control::{Answer, Ask, Asked, failure};
use crate::vm::machine::Machine;

impl Session {
    /// Carries out the orders that have come, up to one that ends the machine's time.
    pub(super) fn on_orders(&mut self, machine: &Machine) -> Option<Turn> {
        let _ = self.inbox.arrived().read();
        while let Some(Asked { ask, answer }) = self.inbox.next() {
            let done = match ask {
                Ask::Stop(patience) => {
                    self.press(machine, "an order to stop", patience);
                    Ok(())
                }
                Ask::Kill => {
                    let _ = answer.send(Ok(()));
                    return Some(Turn::End(End::Forced("an order to kill it".into())));
                }
                Ask::Reboot => match self.is_ending() {
                    Some(refused) => Err(refused),
                    None => {
                        // What comes after it is for the next machine.
                        let _ = self.inbox.arrived().write(1);
                        return Some(Turn::Reset(answer));
                    }
                },
                Ask::Pause => self.pause(machine),
                Ask::Resume => self.resume(machine),
            };
            let _ = answer.send(done);
        }
        None
    }

    fn is_ending(&self) -> Option<Failure> {
        let message = "the VM is being stopped";
        self.stopping
            .as_ref()
            .map(|_| failure(FailureKind::Ending, message))
    }

    fn pause(&mut self, machine: &Machine) -> Answer {
        if let Some(refused) = self.is_ending() {
            return Err(refused);
        }
        if self.paused {
            return Err(failure(
                FailureKind::Unsupported,
                "the VM is paused already",
            ));
        }
        self.paused = true;
        machine.pause();
        self.life.set_state(State::Paused);
        Ok(())
    }

    fn resume(&mut self, machine: &Machine) -> Answer {
        if !self.paused {
            return Err(failure(FailureKind::Unsupported, "the VM is not paused"));
        }
        self.paused = false;
        machine.resume();
        self.life.set_state(State::Running);
        self.life.publish(Event::Resumed);
        Ok(())
    }
}
